"""What a GPU gives beside the CPU: training where environments live there, and where they do not; updates by size.

    python benchmarks/devices.py [--device cpu --device cuda …] [--envs 1024 --envs 16384 …] [--repeats 5]

Pendulum as tensors (`env.backend: torch`), rollouts of 16 steps, the critic's epochs in 16 minibatches, all else the
defaults; Hopper, simulated on the CPU, with the defaults but for the width of the networks; and layers of one's own
(`policy.body`, `value.body`): Hopper's in torch, and convolutions over pictures. Beside an update stand two floors: its
matrix products at the best rate that the device reaches, and its operations in the time that starting one takes, of
which a CUDA graph counts as none. Writes benchmarks/devices.json and .md. `device: auto` (`trpo/runtime/device.py`)
should choose what is clearly faster here.
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
from trpo.runtime.timers import PhaseTimers

HERE = Path(__file__).parent
STEPS = 16  # of a rollout
MINIBATCHES = 16
ENVS = (64, 256, 1024, 4096, 16384)
WIDTHS = (64, 128, 256, 512)  # of Hopper's networks
OWN = (("Hopper-v5", "own_layers:dense"), ("own_layers:Pictures-v0", "own_layers:convolutions"))  # tasks and bodies
UPDATES = ((2048, 64), (2048, 256), (16384, 64), (16384, 256), (131072, 64))  # batch, units of two hidden layers


class Operations(TorchDispatchMode):
    """Counts torch's operations."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


def tensors(device: str, envs: int, hidden: int = 64) -> Config:
    """Pendulum on `device`."""
    batch = envs * STEPS
    env = {"id": "Pendulum-v1", "backend": "torch", "num_envs": envs}
    return config(device, hidden, env=env, batch_size=batch, adam={"minibatch_size": batch // MINIBATCHES})


def simulated(device: str, hidden: int) -> Config:
    """Hopper on the CPU, networks on `device`."""
    return config(device, hidden, env={"id": "Hopper-v5"})


def own_layers(device: str, task: str, body: str) -> Config:
    """A task on the CPU, a user's own layers on `device`."""
    return config(device, 64, env={"id": task}, body={"name": body})


def config(device: str, hidden: int, *, adam: Any = None, body: Any = None, **settings: Any) -> Config:
    network = {"hidden_sizes": [hidden, hidden], "body": body}
    return Config.model_validate(
        {
            **settings,
            "total_steps": 10**12,
            "device": device,
            "policy": network,
            "value": {**network, "adam": adam or {}},
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


def training(config: Config, repeats: int) -> dict[str, Any]:
    with temporary_trainer(config) as trainer:
        trainer.iteration()  # what is recorded is so in the next one, which is not timed
        iteration = took(config.device, trainer.iteration, repeats)
        rollout = took(config.device, trainer.collector.collect, repeats)
    return {
        "device": config.device,
        "task": config.env.id,
        "envs": config.env.num_envs,
        "layers": config.policy.body.name if config.policy.body else config.policy.hidden_sizes[0],
        "batch": config.batch_size,
        "steps_per_s": config.batch_size / iteration,
        "rollout_s": rollout,
        "iteration_s": iteration,
    }


def update(device: str, batch: int, hidden: int, repeats: int) -> Numbers:
    with temporary_trainer(tensors(device, batch // STEPS, hidden)) as trainer:
        trainer.iteration()  # a normaliser that has seen data, a value function that has been fitted
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
    def trained(part: str, title: str, head: str, label: Callable[[dict[str, Any]], str]) -> str:
        rows = [
            (r["device"], label(r), number(r["steps_per_s"]), *map(milliseconds, (r["rollout_s"], r["iteration_s"])))
            for r in result["training"][part]
        ]
        return table(title, ("Device", head, "Steps/s", "Rollout, ms", "Iteration, ms"), rows)

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
        "that of starting torch's operations one by one, of which compiled code leaves few, and graphs.\n"
    )
    sections = [
        head,
        trained(
            "tensors",
            f"Training on Pendulum-v1 as tensors, {STEPS} steps a rollout",
            "Environments",
            lambda r: number(r["envs"]),
        ),
        trained(
            "simulated",
            "Training on Hopper-v5, simulated on the CPU, by the width of the networks",
            "Width",
            lambda r: number(r["layers"]),
        ),
        trained(
            "own layers",
            "Training with layers of one's own, simulated on the CPU",
            "Task: layers",
            lambda r: f"{r['task']}: {r['layers']}",
        ),
    ]
    header = ("Device", "Batch × width", "Update, ms", "Products alone, ms", "Starting alone, ms", "Operations")
    return "\n".join([*sections, table("One update", header, updates), foot])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", action="append", help="repeatable; default: cpu, and cuda where there is one")
    parser.add_argument("--envs", action="append", type=int, help="repeatable; default: 64 to 16384")
    parser.add_argument("--repeats", type=int, default=5, help="of everything (default: 5)")
    parser.add_argument("--out", type=Path, default=HERE, help="where devices.json and .md go")
    args = parser.parse_args()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    devices = args.device or ["cpu", *["cuda"][: len(gpus)]]
    result = {
        "machine": f"{processor()}, {os.cpu_count()} cores; {', '.join(gpus) or 'no GPU'}",
        "torch": torch.__version__,
        "training": {
            part: [training(config, args.repeats) for config in configs]
            for part, configs in {
                "tensors": [tensors(device, envs) for envs in args.envs or ENVS for device in devices],
                "simulated": [simulated(device, hidden) for hidden in WIDTHS for device in devices],
                "own layers": [own_layers(device, *own) for own in OWN for device in devices],
            }.items()
        },
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
