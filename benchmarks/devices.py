"""What a GPU gives: training on environments that live there, and updates by their size, beside the CPU.

    python benchmarks/devices.py [--device cpu --device cuda …] [--envs 1024 --envs 16384 …] [--repeats 5]

Pendulum as tensors (`env.backend: torch`), rollouts of 16 steps, the critic's epochs in 16 minibatches, all else the
defaults. Under an update stand two floors: its matrix products at the best rate that the device reaches, and its
operations in the time that starting one takes. Writes benchmarks/devices.json and .md. `device: auto`
(`trpo/device.py`) should choose what is faster here.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trpo import Config
from trpo.agent import UpdateReport
from trpo.benchmark.floor import matmul_rate, update_flops
from trpo.benchmark.markdown import milliseconds, number, table
from trpo.benchmark.ours import temporary_trainer
from trpo.benchmark.speed import processor
from trpo.benchmark.work import Numbers, median_seconds, repeat, wait
from trpo.timers import PhaseTimers

HERE = Path(__file__).parent
STEPS = 16  # of a rollout
MINIBATCHES = 16
UPDATES = ((2048, 64), (2048, 256), (16384, 64), (16384, 256), (131072, 64))  # batch, units of two hidden layers


class Operations(TorchDispatchMode):
    """Counts torch's operations."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


def config(device: str, envs: int, hidden: int = 64) -> Config:
    batch = envs * STEPS
    return Config.model_validate(
        {
            "env": {"id": "Pendulum-v1", "backend": "torch", "num_envs": envs},
            "total_steps": 10**12,
            "batch_size": batch,
            "device": device,
            "policy": {"hidden_sizes": [hidden, hidden]},
            "value": {"hidden_sizes": [hidden, hidden], "adam": {"minibatch_size": batch // MINIBATCHES}},
            "evaluation": {"every_steps": 0},
            "checkpoint": {"every_steps": 0},
        }
    )


def took(device: str, function: Callable[[], object], repeats: int) -> float:
    """Median seconds, all work on the device done."""

    def done() -> None:
        function()
        wait(device)

    return median_seconds(done, before=lambda: wait(device), repeats=repeats)


def training(device: str, envs: int, repeats: int) -> Numbers:
    with temporary_trainer(config(device, envs)) as trainer:
        iteration = took(device, trainer._iteration, repeats)
        rollout = took(device, trainer.collector.collect, repeats)
    return {"steps_per_s": envs * STEPS / iteration, "rollout_s": rollout, "iteration_s": iteration}


def update(device: str, batch: int, hidden: int, repeats: int) -> Numbers:
    with temporary_trainer(config(device, batch // STEPS, hidden)) as trainer:
        trainer._iteration()  # a normaliser that has seen data, a value function that has been fitted
        agent, (rollout, _) = trainer.agent, trainer.collector.collect()

        def whole() -> UpdateReport:
            return agent.update(rollout, progress=0.0, timers=PhaseTimers())

        whole_s = took(device, whole, repeats)
        with Operations() as operations:
            step = whole().step
        parameters = agent.policy.distribution.param_dim
    # Here torch has all threads again; within, compiled code has.
    flops = update_flops(
        [3, hidden, hidden, parameters],
        batch,
        cg_iterations=step.cg.iterations if step.cg else 0,
        evaluations=step.search.tries if step.search else 0,
    )
    return {
        "whole_s": whole_s,
        "operations": operations.count,
        "start_floor_s": operations.count * start_time(device),
        "product_floor_s": flops / matmul_rate(hidden, batch, device=device),
    }


@torch.no_grad()
def start_time(device: str) -> float:
    """Seconds from one small operation to the next."""
    x = torch.zeros(1, device=device)
    return took(device, lambda: repeat(lambda: x.add_(1.0), 1000), 10) / 1000


def report(result: dict[str, Any]) -> str:
    training = [
        (
            r["device"],
            number(r["envs"]),
            number(r["steps_per_s"]),
            *map(milliseconds, (r["rollout_s"], r["iteration_s"])),
        )
        for r in result["training"]
    ]
    updates = [
        (
            r["device"],
            f"{r['batch']} × {r['hidden']}",
            *map(milliseconds, (r["whole_s"], r["product_floor_s"], r["start_floor_s"])),
            number(r["operations"]),
        )
        for r in result["updates"]
    ]
    head = f"Made by `python benchmarks/devices.py`: {result['machine']}; torch {result['torch']}.\n"
    foot = (
        "An update holds the critic's and the statistics. Its floors are that of the policy's matrix products, and\n"
        "that of starting all of torch's operations, of which compiled code on the CPU leaves few.\n"
    )
    header = ("Device", "Environments", "Steps/s", "Rollout, ms", "Iteration, ms")
    sections = [head, table(f"Training on Pendulum-v1 as tensors, {STEPS} steps a rollout", header, training)]
    header = ("Device", "Batch × width", "Update, ms", "Products alone, ms", "Starting alone, ms", "Operations")
    return "\n".join([*sections, table("One update", header, updates), foot])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", action="append", help="repeatable; default: cpu, and cuda where there is one")
    parser.add_argument("--envs", action="append", type=int, help="repeatable; default: 1024, 4096 and 16384")
    parser.add_argument("--repeats", type=int, default=5, help="of everything (default: 5)")
    parser.add_argument("--out", type=Path, default=HERE, help="where devices.json and .md go")
    args = parser.parse_args()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    devices = args.device or ["cpu", *["cuda"][: len(gpus)]]
    result = {
        "machine": f"{processor()}, {os.cpu_count()} cores; {', '.join(gpus) or 'no GPU'}",
        "torch": torch.__version__,
        "training": [
            {"device": device, "envs": envs, **training(device, envs, args.repeats)}
            for envs in args.envs or (1024, 4096, 16384)
            for device in devices
        ],
        "updates": [
            {"device": device, "batch": batch, "hidden": hidden, **update(device, batch, hidden, args.repeats)}
            for batch, hidden in UPDATES
            for device in devices
        ],
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "devices.json").write_text(json.dumps(result, indent=1) + "\n")
    (args.out / "devices.md").write_text(report(result))
    print(report(result), end="")


if __name__ == "__main__":
    main()
