"""How many directions a step follows, and how many a batch can tell from noise: d(λ) = tr F(F + λI)⁻¹ task by task.

    python benchmarks/effective_dimension.py [--task swimmer --task humanoid …] [--updates 50]

Trains Gaussian policies for some updates, collects one batch more and estimates d(λ) for several λ
(`trpo/natural_gradient/effective_dimension.py`). Writes benchmarks/effective_dimension.json and .md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from trpo import Trainer, load_config
from trpo.benchmark.markdown import number, table
from trpo.natural_gradient import effective_dimension

HERE = Path(__file__).parent
TASKS = ("swimmer", "hopper", "walker2d", "half_cheetah", "ant", "humanoid")
DAMPINGS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
CG_ITERATIONS = 60  # of the estimate: converged for λ ≥ 0.03; for 0.01 up to 6 % too low
PROBES = 4


def measure(task: str, updates: int) -> dict[str, Any]:
    config = load_config(HERE.parent / "configs" / f"{task}.yaml", ["evaluation.every_steps=0", "policy.bins=null"])
    with tempfile.TemporaryDirectory() as root:
        trainer = Trainer(config, root=root, console=False)
        trainer.train(max_updates=updates)
        trainer = Trainer(config, root=root, resume=trainer.run.path, console=False)
        agent = trainer.agent
        batch, _, _ = agent.prepare(trainer.collector.collect()[0], progress=trainer.progress)
        generator = torch.Generator().manual_seed(0)

        def dimension(damping: float) -> float:
            probes = [
                effective_dimension(
                    agent.policy, batch, damping=damping, cg_iterations=CG_ITERATIONS, generator=generator
                )
                for _ in range(PROBES)
            ]
            return sum(probes) / PROBES

        result = {
            "batch": len(batch.obs),
            "parameters": len(agent.policy.theta.vector),
            "action_dimensions": agent.policy.distribution.action_dim,
            "dimension": {str(damping): dimension(damping) for damping in DAMPINGS},
        }
        trainer.close()
        return result


def report(results: dict[str, Any], updates: int) -> str:
    rows = [
        (task, *map(number, (r["action_dimensions"], r["parameters"], *r["dimension"].values())))
        for task, r in results.items()
    ]
    header = ("Task", "Actions", "Parameters", *(f"λ = {damping:g}" for damping in DAMPINGS))
    made = f"Made by `python benchmarks/effective_dimension.py --updates {updates}`."
    return f"{made}\n\n{table('d(λ)', header, rows)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", action="append", help="repeatable; default: six of MuJoCo's")
    parser.add_argument("--updates", type=int, default=50)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = {task: measure(task, args.updates) for task in args.task or TASKS}
    (HERE / "effective_dimension.json").write_text(json.dumps(results, indent=1) + "\n")
    text = report(results, args.updates)
    (HERE / "effective_dimension.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
