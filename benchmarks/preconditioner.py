"""How near the natural gradient k iterations of CG come, plain and preconditioned, and what they cost.

    python benchmarks/preconditioner.py [--task half_cheetah --task walker2d] [--steps 300000]

Trains each task (or takes up the run it made before), collects one batch with the trained policy, and compares the
improvement per root of KL, gᵀx / √(xᵀFx), with that of the exact solution of (F + λI)x = g in float64. Writes
benchmarks/preconditioner.json and .md.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from trpo import Trainer, load_config
from trpo.benchmark.markdown import number, table
from trpo.benchmark.ours import trained
from trpo.benchmark.work import median_seconds
from trpo.natural_gradient import KroneckerPreconditioner, conjugate_gradient, fisher_product
from trpo.policy import Policy

HERE = Path(__file__).parent
ITERATIONS = (1, 3, 5, 10, 15, 25, 50)
DAMPINGS = (0.1, 0.01)


def measure(trainer: Trainer) -> dict[str, Any]:
    agent = trainer.agent
    policy, dist = agent.policy, agent.policy.distribution
    rollout, _ = trainer.collector.collect()
    batch, _, _ = agent.prepare(rollout, progress=1.0)
    count = float(len(batch.obs))
    result: dict[str, Any] = {"batch": len(batch.obs), "parameters": len(policy.theta.vector), "damping": {}}

    linearization = policy.linearize(batch.obs)
    eta = linearization.output
    scores = dist.score(eta, batch.action)
    gradient = linearization.vjp(scores * batch.advantage[:, None]) / count
    fisher = fisher_product(linearization, dist, count=count)

    # The judge is float64: F of the same θ and batch.
    wide = in_float64(policy).linearize(batch.obs.double())
    wide_fisher = fisher_product(wide, dist, count=count)
    wide_gradient = wide.vjp(dist.score(wide.output, batch.action.double()) * batch.advantage.double()[:, None]) / count

    def improvement(x: torch.Tensor) -> float:
        x = x.double()
        return float(wide_gradient @ x / (x @ wide_fisher(x)).sqrt())

    for damping in DAMPINGS:
        exact_solution = conjugate_gradient(
            lambda v, damping=damping: wide_fisher(v).add_(v, alpha=damping),
            wide_gradient,
            max_iterations=5000,
            tolerance=1e-10,
        )
        exact = improvement(exact_solution.x)
        preconditioner = KroneckerPreconditioner(linearization, scores, count=count, damping=damping)
        rows = {"plain": {}, "kronecker": {}}
        for name, p in (("plain", None), ("kronecker", preconditioner)):
            for k in ITERATIONS:
                solution = conjugate_gradient(
                    lambda v, damping=damping: fisher(v).add_(v, alpha=damping), gradient, max_iterations=k,
                    preconditioner=p,
                )  # fmt: skip
                rows[name][k] = improvement(solution.x) / exact
        result["damping"][damping] = {
            "relative_improvement": rows,
            "gradient_alone": improvement(gradient) / exact,
            "preconditioner_alone": improvement(preconditioner(gradient)) / exact,
        }
    result["milliseconds"] = {
        "fisher_product": timed(lambda: fisher(gradient)),
        "build_preconditioner": timed(
            lambda: KroneckerPreconditioner(linearization, scores, count=count, damping=DAMPINGS[0])
        ),
        "apply_preconditioner": timed(lambda: preconditioner(gradient)),
    }
    return result


def in_float64(policy: Policy) -> Policy:
    """The same policy in double precision."""
    return Policy(copy.deepcopy(policy.network).double(), policy.distribution, copy.deepcopy(policy.normalizer))


def timed(function: Callable[[], object]) -> float:
    """Median milliseconds of a call."""
    return 1e3 * median_seconds(function, before=lambda: None, repeats=50)


def report(results: dict[str, Any]) -> str:
    relative = [
        (
            f"{task}, damping {damping}",
            *(f"{rows['plain'][k]:.2f} / {rows['kronecker'][k]:.2f}" for k in rows["plain"]),
            f"{r['gradient_alone']:.2f} / {r['preconditioner_alone']:.2f}",
        )
        for task, result in results.items()
        for damping, r in result["damping"].items()
        for rows in [r["relative_improvement"]]
    ]
    costs = [
        (task, *(number(x, 2) for x in ms.values()), number(ms["build_preconditioner"] / ms["fisher_product"], 1))
        for task, result in results.items()
        for ms in [result["milliseconds"]]
    ]
    title = "Improvement per root of KL relative to the exact solution, plain / Kronecker-preconditioned CG"
    header = ("Iterations", *map(str, ITERATIONS), "gradient / P⁻¹g alone")
    costs_header = ("", "Fisher product, ms", "build preconditioner, ms", "apply it, ms", "build, in products")
    return f"{table(title, header, relative)}\n{table('What it costs', costs_header, costs)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", action="append", default=[])
    parser.add_argument("--steps", type=int, default=300_000)
    args = parser.parse_args()
    results = {}
    for task in args.task or ["half_cheetah", "walker2d"]:
        settings = [f"total_steps={args.steps}", "evaluation.every_steps=0", "policy.bins=null"]
        config = load_config(HERE.parent / "configs" / f"{task}.yaml", settings)
        trainer = trained(config, HERE.parent / "runs" / "preconditioner")
        results[task] = measure(trainer)
        trainer.close()
    assert all(math.isfinite(x) for r in results.values() for x in r["milliseconds"].values())
    (HERE / "preconditioner.json").write_text(json.dumps(results, indent=1) + "\n")
    text = report(results)
    (HERE / "preconditioner.md").write_text(
        f"Made by `python benchmarks/preconditioner.py --steps {args.steps}`.\n\n{text}"
    )
    print(text)


if __name__ == "__main__":
    main()
