"""Commands and saved policies for tests: scripts run in this process or in one of their own, and small policies."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from helpers import seeded

from trpo.config import Config
from trpo.policy import Policy, build_policy
from trpo.run.saved_policy import SavedPolicy, load_policy, save_policy

PROJECT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Outcome:
    status: int
    out: str
    err: str


def run_script(name: str, *args: object, capture: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch) -> Outcome:
    """`python scripts/<name> args…`, in this process: saves the seconds that imports take."""
    capture.readouterr()
    patch.setattr(sys, "argv", [name, *map(str, args)])
    patch.setattr(sys, "path", [*sys.path])
    with pytest.raises(SystemExit) as exit_info:
        runpy.run_path(str(PROJECT / "scripts" / name), run_name="__main__")
    out, err = capture.readouterr()
    return Outcome(int(exit_info.value.code or 0), out, err)


def command(name: str, *args: object) -> list[str]:
    return [sys.executable, str(PROJECT / "scripts" / name), *map(str, args)]


def run_process(name: str, *args: object, **environment: str) -> Outcome:
    """The same in a process of its own."""
    done = subprocess.run(
        command(name, *args), env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def one_line(text: str) -> str:
    """The only line of `text`."""
    assert text.count("\n") == 1 and text.endswith("\n"), text
    return text.strip()


def config_for(env_id: str = "CartPole-v1", **changes: Any) -> Config:
    return Config.model_validate({"env": {"id": env_id}, "policy": {"hidden_sizes": (8, 8)}, **changes})


def random_policy(config: Config, obs_dim: int, action_space: spaces.Space[Any], *, seed: int = 0) -> Policy:
    """A policy with large random weights and a normaliser that has seen data: far from every symmetric special case."""
    space = spaces.Box(-np.inf, np.inf, (obs_dim,), np.float32)
    policy = build_policy(config, space, action_space, generator=seeded(seed), device=torch.device("cpu"))
    vector = policy.theta.vector
    policy.theta.assign_(0.7 * torch.randn(vector.shape, generator=seeded(seed + 1), dtype=vector.dtype))
    policy.normalizer.update(0.5 + 2 * torch.randn(50, obs_dim, generator=seeded(seed + 2)))
    return policy


def saved_policy(
    path: Path, config: Config, obs_dim: int, action_space: spaces.Space[Any], *, seed: int = 0
) -> SavedPolicy:
    """Such a policy, saved to and loaded from `path`."""
    policy = random_policy(config, obs_dim, action_space, seed=seed)
    save_policy(path, policy, config, action_space, {"env_steps": 4096, "seed": 3})
    return load_policy(path)
