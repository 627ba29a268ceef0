"""What a step gains on samples it was not computed from: how exact should a natural gradient be?

    python benchmarks/held_out.py [--task hopper --task ant] [--steps 300000] [--set KEY=VALUE]

Trains each task (or takes up the run it made before) and collects rollouts with the policy it ended with. Steps are
computed from single batches, with several dampings, CG iterations and λ of GAE, scaled to one KL, and judged by

    gᵀx at ½ xᵀFx = 0.01        first-order improvement of the mean advantage, in its standard deviations

with g and F of 56 other rollouts, whose advantages are those of λ = 0.98, and whose spread gives the standard error.
The same number of the batch itself, which is what the line search sees, stands beside it. Writes
benchmarks/held_out.json and .md, or other files by --out.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trpo import Trainer, load_config
from trpo.batch import Batch
from trpo.benchmark.markdown import number, table
from trpo.benchmark.ours import trained
from trpo.natural_gradient import conjugate_gradient, fisher_product
from trpo.policy import Policy

HERE = Path(__file__).parent
TASKS = ("half_cheetah", "hopper", "walker2d", "ant", "humanoid")
DAMPINGS = (0.01, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0)
ITERATIONS = (5, 15, 50)
LAMBDAS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
JUDGE_LAMBDA = 0.98
TRAINED_ON, JUDGED_BY = 8, 56  # rollouts
KL = 0.01
DEFAULT_ITERATIONS, DEFAULT_DAMPING, DEFAULT_LAMBDA = 15, 1.0, 0.95  # of what is not varied


def batches(trainer: Trainer) -> dict[float, list[Batch]]:
    """The same rollouts with the advantages of each λ."""
    agent, original = trainer.agent, trainer.agent.config
    found: dict[float, list[Batch]] = {lambda_: [] for lambda_ in LAMBDAS}
    for _ in range(TRAINED_ON + JUDGED_BY):
        rollout, _ = trainer.collector.collect()
        samples = agent.scale(rollout)  # once: it counts what it scales
        for lambda_, some in found.items():
            agent.config = original.model_copy(update={"gae": original.gae.model_copy(update={"lambda_": lambda_})})
            some.append(agent.estimate(samples, progress=1.0)[0])
    agent.config = original
    return found


class Quadratic:
    """Policy gradient and Fisher products of some batches at the policy's θ."""

    def __init__(self, policy: Policy, some: Sequence[Batch]):
        obs, action, advantage = (
            torch.cat([getattr(b, name) for b in some]) for name in ("obs", "action", "advantage")
        )
        linearization, count = policy.linearize(obs), float(len(obs))
        score = policy.distribution.score(linearization.output, action)
        self.gradient = linearization.vjp(score * advantage[:, None]) / count
        self.fisher: Callable[[Tensor], Tensor] = fisher_product(linearization, policy.distribution, count=count)
        self.samples = len(obs)

    def direction(self, damping: float, iterations: int) -> Tensor:
        def product(v: Tensor) -> Tensor:
            return self.fisher(v).add_(v, alpha=damping)

        return conjugate_gradient(product, self.gradient, max_iterations=iterations).x

    def at_kl(self, x: Tensor) -> Tensor:
        """αx with ½ α²xᵀFx = KL."""
        return x * (2 * KL / (x @ self.fisher(x))).sqrt()

    def gain(self, x: Tensor) -> float:
        """gᵀx at that KL."""
        return float(self.gradient @ self.at_kl(x))


def measure(trainer: Trainer) -> dict[str, Any]:
    policy = trainer.agent.policy
    found = batches(trainer)
    judge = Quadratic(policy, found[JUDGE_LAMBDA][TRAINED_ON:])
    singles = [Quadratic(policy, [batch]) for batch in found[DEFAULT_LAMBDA][:TRAINED_ON]]

    def both(some: Sequence[Quadratic], damping: float, iterations: int) -> dict[str, float]:
        steps = [(single, single.direction(damping, iterations)) for single in some]
        return {
            "batch": sum(single.gain(x) for single, x in steps) / len(steps),
            "held_out": sum(judge.gain(x) for _, x in steps) / len(steps),
        }

    def standard_error() -> float:
        """Of the held-out gain of the steps with the defaults, from its spread over rollouts.

        Samples are not independent: environments have memories, and action noise may have one.
        """
        defaults = [single.direction(DEFAULT_DAMPING, DEFAULT_ITERATIONS) for single in singles]
        step = torch.stack([judge.at_kl(x) for x in defaults]).mean(0)
        gains = [float(Quadratic(policy, [batch]).gradient @ step) for batch in found[JUDGE_LAMBDA][TRAINED_ON:]]
        return statistics.stdev(gains) / math.sqrt(len(gains))

    by_lambda = {lambda_: [Quadratic(policy, [b]) for b in some[:TRAINED_ON]] for lambda_, some in found.items()}
    return {
        "parameters": len(policy.theta.vector),
        "std": policy.std(),
        "judged_by": judge.samples,
        "standard_error": standard_error(),
        "damping": {str(k): {str(d): both(singles, d, k) for d in DAMPINGS} for k in ITERATIONS},
        "lambda": {
            str(lambda_): both(some, DEFAULT_DAMPING, DEFAULT_ITERATIONS) for lambda_, some in by_lambda.items()
        },
    }


def report(results: dict[str, Any], command: str) -> str:
    by_damping = [
        (
            task,
            str(k),
            *(f"{number(r['held_out'], 4)} ({number(r['batch'], 2)})" for r in result["damping"][str(k)].values()),
        )
        for task, result in results.items()
        for k in ITERATIONS
    ]
    by_lambda = [
        (task, *(number(r["held_out"], 4) for r in result["lambda"].values()), number(result["standard_error"], 4))
        for task, result in results.items()
    ]
    what = __doc__.split("\n\n", 2)[2].split(" Writes")[0].strip()
    title = "Damping λ of (F + λI)x = g and iterations of CG: gain on other samples (on its own batch)"
    sections = [f"Made by `{command}`.\n\n{what}\n", table(title, ("", "iterations", *map(str, DAMPINGS)), by_damping)]
    title = f"λ of GAE (damping {DEFAULT_DAMPING:g}, {DEFAULT_ITERATIONS} iterations): gain on other samples"
    return "\n".join([*sections, table(title, ("", *map(str, LAMBDAS), "standard error"), by_lambda)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", action="append", choices=TASKS)
    parser.add_argument("--steps", type=int, default=300_000)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, default=HERE / "held_out", help="without the suffixes .json and .md")
    args = parser.parse_args()
    tasks = args.task or TASKS
    file = args.out.with_suffix(".json")
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    for task in tasks:
        settings = [f"total_steps={args.steps}", "evaluation.every_steps=0", "policy.bins=null", *args.set]
        config = load_config(HERE.parent / "configs" / f"{task}.yaml", settings)
        trainer = trained(config, HERE.parent / "runs" / "held_out")
        try:
            results[task] = measure(trainer)
        finally:
            trainer.close()
        file.write_text(json.dumps(results, indent=1))
        print(task, "done", flush=True)
    command = shlex.join(["python", "benchmarks/held_out.py", *sys.argv[1:]])
    text = report({task: results[task] for task in TASKS if task in results}, command)
    args.out.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
