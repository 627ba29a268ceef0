"""The work that every contender of the speed benchmark does, how it is timed, and with which packages."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any, Protocol

import torch

OURS, SB3 = "trpo", "sb3-contrib"  # contenders by name; the others are in `peers.py` alone
UPDATE_TASK = "Hopper-v5"
UPDATE_ENVS = 8
BATCH = 2048
HIDDEN = 64  # units of each of two tanh layers, policy and value
CG_ITERATIONS = 15
DAMPING = 0.1
MAX_KL = 0.01
CRITIC_EPOCHS = 10
MINIBATCH = 128
LEARNING_RATE = 1e-3
GAMMA, LAMBDA = 0.99, 0.95

PACKAGES = ("torch", "numpy", "gymnasium", "mujoco", "envpool", "sb3-contrib", "stable-baselines3", "tianshou", "skrl")

Numbers = dict[str, float]


class Contender(Protocol):
    """One implementation. A method is one round of a measurement; its keywords are what the parent process sent."""

    def update(self, *, repeats: int) -> Numbers:
        """Seconds of one update on the same real rollout: `whole_s`, `policy_s`, `value_s`; `accepted` is 0 or 1."""

    def train(self, *, task: str, setup: dict[str, Any], steps: int, recipe: bool = False) -> Numbers:
        """`steps_per_s` of training, updates included, after one iteration to warm up.

        With `recipe`, where it has one, it does what it is trained with where returns are compared.
        """


def versions() -> dict[str, str]:
    """Of those of `PACKAGES` that are installed."""
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def iterations(steps: int) -> int:
    """Updates of `BATCH` steps that are at least `steps` steps."""
    return -(-steps // BATCH)


def seconds(function: Callable[[], object]) -> float:
    """Wall-clock time of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def wait(device: str) -> None:
    """Until an accelerator has done what it was given."""
    if device != "cpu":
        torch.accelerator.synchronize(torch.device(device))


def repeat(function: Callable[[], object], times: int) -> None:
    for _ in range(times):
        function()


def median_seconds(function: Callable[[], object], *, before: Callable[[], object], repeats: int) -> float:
    """Median over calls, each after `before` (not timed) and all after one that warms up."""
    times = []
    for _ in range(repeats + 1):
        before()
        times.append(seconds(function))
    return statistics.median(times[1:])


def medians(samples: Sequence[Numbers]) -> Numbers:
    """Median of each number over samples with the same keys."""
    return {key: statistics.median(sample[key] for sample in samples) for key in samples[0]}
