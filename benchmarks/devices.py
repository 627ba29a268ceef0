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
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trpo import Config, Trainer
from trpo.benchmark.floor import update_flops
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


@contextmanager
def trainer_on(device: str, envs: int, hidden: int = 64) -> Iterator[Trainer]:
    batch = envs * STEPS
    config = Config.model_validate(
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
    with (
        tempfile.TemporaryDirectory() as root,
        closing(Trainer(config, root=root, console=False)) as trainer,
        trainer.threads(),
    ):
        trainer._iteration()  # warms up
        yield trainer


def seconds(device: str, function: Callable[[], object], repeats: int) -> float:
    """Median, all work on the device done."""
    taken = []
    for _ in range(repeats):
        wait(device)
        start = time.perf_counter()
        function()
        wait(device)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def wait(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize(torch.device(device))


def training(device: str, envs: int, repeats: int) -> dict[str, float]:
    with trainer_on(device, envs) as trainer:
        iteration = seconds(device, trainer._iteration, repeats)
        rollout = seconds(device, trainer.collector.collect, repeats)
    return {"steps_per_s": envs * STEPS / iteration, "rollout_s": rollout, "iteration_s": iteration}


def update(device: str, batch: int, hidden: int, repeats: int) -> dict[str, float]:
    with trainer_on(device, batch // STEPS, hidden) as trainer:
        agent, (rollout, _) = trainer.agent, trainer.collector.collect()

        def whole() -> Any:
            return agent.update(rollout, progress=0.0, timers=PhaseTimers())

        took = seconds(device, whole, repeats)
        with Operations() as operations:
            report = whole()
        parameters = agent.policy.distribution.param_dim
    # Here torch has all threads again; within, compiled code has.
    cg, search = report.step.cg, report.step.search
    flops = update_flops(
        [3, hidden, hidden, parameters],
        batch,
        cg_iterations=cg.iterations if cg else 0,
        evaluations=search.tries if search else 0,
    )
    return {
        "whole_s": took,
        "operations": operations.count,
        "start_floor_s": operations.count * start_time(device),
        "product_floor_s": flops / max(product_rate(device, rows, hidden) for rows in (1024, batch)),
    }


@torch.no_grad()
def start_time(device: str) -> float:
    """Seconds from one small operation to the next."""
    x = torch.zeros(1, device=device)

    def many() -> None:
        for _ in range(1000):
            x.add_(1.0)

    return seconds(device, many, 10) / 1000


@torch.no_grad()
def product_rate(device: str, batch: int, hidden: int) -> float:
    """Most floating-point operations per second of products like those of a hidden layer."""
    rows, square = torch.randn(batch, hidden, device=device), torch.randn(hidden, hidden, device=device)
    return 2 * batch * hidden * hidden / min(seconds(device, lambda: rows @ square, 1) for _ in range(30))


def table(header: str, rows: list[str]) -> list[str]:
    return ["", header, "|" + "---|" * header.count(" | ") + "---|", *rows]


def report(result: dict[str, Any]) -> str:
    lines = [
        f"Made by `python benchmarks/devices.py`: {result['machine']}; torch {result['torch']}.",
        "",
        "Training on Pendulum-v1 as tensors, 16 steps a rollout:",
        *table(
            "| Device | Environments | Steps/s | Rollout, ms | Iteration, ms |",
            [
                f"| {r['device']} | {r['envs']:,} | {r['steps_per_s']:,.0f} | {1e3 * r['rollout_s']:,.1f} "
                f"| {1e3 * r['iteration_s']:,.1f} |"
                for r in result["training"]
            ],
        ),
        "",
        "One update, critic and statistics included; the floors are that of the policy's matrix products, and that of "
        "starting all of torch's operations, of which compiled code on the CPU leaves few:",
        *table(
            "| Device | Batch × width | Update, ms | Products alone, ms | Starting alone, ms | Operations |",
            [
                f"| {r['device']} | {r['batch']} × {r['hidden']} | {1e3 * r['whole_s']:,.1f} "
                f"| {1e3 * r['product_floor_s']:,.1f} | {1e3 * r['start_floor_s']:,.1f} | {r['operations']:,} |"
                for r in result["updates"]
            ],
        ),
    ]
    return "\n".join(lines) + "\n"


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
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {', '.join(gpus) or 'no GPU'}",
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
