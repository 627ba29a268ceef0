"""What `test_device.py` runs in processes of their own: `python on_pretended_gpu.py CASE [ARGUMENT …]` prints JSON."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from pretended_gpu import DEVICE, OnDevice, pretended_gpu, waits

import trpo.trainer
from trpo.batch import Batch
from trpo.config import Config, NaturalGradientConfig
from trpo.config.file import parse_config
from trpo.natural_gradient import trust_region_step
from trpo.policy import build_policy

BOX = spaces.Box(-1, 1, (2,), np.float32)
POLICIES: dict[str, tuple[spaces.Space[Any], dict[str, Any]]] = {
    "ordinal": (BOX, {}),
    "gaussian": (BOX, {"bins": None}),
    "gaussian_given_std": (BOX, {"bins": None, "std": 0.3}),
    "gaussian_state_std": (BOX, {"bins": None, "std": {"state_dependent": True}}),
    "categorical": (spaces.Discrete(3), {}),
    "multi_categorical": (spaces.MultiDiscrete([2, 3]), {}),
    "bernoulli": (spaces.MultiBinary(3), {}),
}


def trained(settings: str, device: torch.device) -> torch.Tensor:
    """θ of policy and V after a run that was stopped once and resumed, one after the other, on the CPU."""
    trpo.trainer.training_device = lambda config: device  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as root:
        config = parse_config(settings)
        path = trpo.trainer.Trainer(config, root=root, console=False).train(max_updates=2).directory
        trainer = trpo.trainer.Trainer(config, root=root, resume=path, console=False)
        trainer.train()
    parts = (trainer.agent.policy.theta.vector, trainer.agent.value.theta.vector)
    assert all(isinstance(part, OnDevice) == (device == DEVICE) for part in parts)
    return torch.cat([part.cpu() for part in parts])


def training(settings: str) -> float:
    """How far a run on the pretended GPU ends from the same on the CPU, relative to the length of what it learned."""
    expected = trained(settings, torch.device("cpu"))
    with pretended_gpu():
        actual = trained(settings, DEVICE)
    return float((actual - expected).norm() / expected.norm())


def step_waits() -> dict[str, dict[str, tuple[int, int]]]:
    """How often steps of each policy wait but for their candidates, and how many of these there are."""
    with pretended_gpu():
        return {name: _step_waits(*policy) for name, policy in POLICIES.items()}


def _step_waits(space: spaces.Space[Any], settings: dict[str, Any]) -> dict[str, tuple[int, int]]:
    config = Config.model_validate({"env": {"id": "Any-v0"}, "device": "cpu", "policy": settings})
    obs_space = spaces.Box(-1, 1, (3,), np.float32)

    def take(*, max_kl: float = 0.01, iterations: int = 3, preconditioner: str | None = None) -> tuple[int, int]:
        generator = torch.Generator().manual_seed(0)
        policy = build_policy(config, obs_space, space, generator=generator, device=DEVICE)
        obs, advantage = (torch.randn(*shape, generator=generator).to(DEVICE) for shape in ((64, 3), (64,)))
        batch = Batch(obs, policy.sample(obs, policy.noise(64, generator=generator)), advantage)
        step = NaturalGradientConfig.model_validate(
            {"cg_tolerance": 0.0, "cg_iterations": iterations, "preconditioner": preconditioner}
        )
        waits.clear()
        report = trust_region_step(policy, batch, max_kl=max_kl, settings=step)
        assert report.cg is not None and report.cg.iterations == iterations
        assert report.search is not None
        return len(waits) - report.search.tries, report.search.tries

    return {
        "3 iterations": take(),
        "9 iterations": take(iterations=9),
        "3 preconditioned iterations": take(preconditioner="kronecker"),
        "9 preconditioned iterations": take(preconditioner="kronecker", iterations=9),
        "too long a step": take(max_kl=100.0),
    }


def rollout_waits(settings: str, *lengths: str) -> list[int]:
    """How often rollouts of so many steps wait."""
    trpo.trainer.training_device = lambda config: DEVICE  # type: ignore[assignment]
    counts = []
    with pretended_gpu(), tempfile.TemporaryDirectory() as root:
        for length in lengths:
            config = parse_config(settings)
            config = config.model_copy(update={"batch_size": int(length) * config.env.num_envs})
            trainer = trpo.trainer.Trainer(config, root=root, console=False)
            waits.clear()
            trainer.collector.collect()
            counts.append(len(waits))
            trainer.close()
    return counts


def refusals() -> list[str]:
    """What the pretended GPU says of things that a real one does not do, and what it waited for meanwhile."""
    said = []
    with pretended_gpu():
        x = torch.zeros(2, 3, device=DEVICE)
        for wrong in (lambda: x + torch.ones(3), lambda: torch.cat([x, torch.ones(1, 3)]), lambda: x @ torch.ones(3)):
            try:
                wrong()
            except RuntimeError as error:
                said.append(str(error))
        waits.clear()
        float((x + 2 * x.sum()).norm()), x[x > 0], torch.ones(3).to(DEVICE), x.cpu(), x.nonzero(), x[0].tolist()
        x[1].add_(1.0)
        assert x.cpu().tolist() == [[0, 0, 0], [1, 1, 1]]  # a view writes where it looks
    return [*said, *waits]


if __name__ == "__main__":
    torch.set_num_threads(1)  # tensors are small
    cases: dict[str, Callable[..., Any]] = {f.__name__: f for f in (training, step_waits, rollout_waits, refusals)}
    print(json.dumps(cases[sys.argv[1]](*sys.argv[2:])))
