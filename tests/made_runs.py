"""Curves, and directories of runs that have them, without training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from trpo.analysis.curves import Curve
from trpo.run.metrics import MetricsWriter

RETURN = "rollout/ep_rew_mean"


def make_curve(
    steps: Sequence[float], values: Sequence[float], *, seed: int = 0, name: str = "trpo", env_id: str = "Env-v0"
) -> Curve:
    return Curve(env_id, name, seed, np.array(steps, float), np.array(values, float), Path(f"{name}-s{seed}"))


def make_run(
    directory: Path,
    *,
    seed: int = 0,
    name: str = "trpo",
    env_id: str = "CartPole-v1",
    values: Sequence[float | None] = (1.0, 2.0, 3.0),
) -> Path:
    """A run's directory as training leaves it, with one row for every 1000 steps."""
    with MetricsWriter(directory, total_steps=10_000, console=False) as writer:
        for index, value in enumerate(values):
            writer.write({"rollout/ep_len_mean": 9.0, RETURN: value}, env_steps=1000 * (index + 1))
        writer.write_evaluation({"eval/mean_reward": 10.0 + seed}, env_steps=3000)
    (directory / "config.yaml").write_text(f"env: {{id: {env_id}}}\nname: {name}\nseed: {seed}\n")
    return directory
