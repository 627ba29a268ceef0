"""Learning over seeds, judged by the last policy, deterministic, on Gymnasium's environments. Minutes: `make slow`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from trpo.benchmark.learning import plan, run
from trpo.benchmark.learning_results import load_results

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

CONFIGS = Path(__file__).parents[1] / "configs"


def mean_returns(task: str, tmp_path: Path, *, seeds: int, episodes: int = 100) -> np.ndarray:
    out = tmp_path / "results"
    jobs = plan([task], seeds, configs=CONFIGS, out=out, root=tmp_path / "runs", overrides=["evaluation.every_steps=0"])
    assert run(jobs, parallel=2, episodes=episodes) == []
    return np.array([np.mean(result["returns"]) for result in load_results(out)[task]])


def test_pendulum_in_100k_steps(tmp_path: Path) -> None:
    """Best published TRPO at this budget: −174.6, one agent."""
    scores = mean_returns("pendulum", tmp_path, seeds=5)
    assert scores.mean() >= -165 and scores.min() >= -180, scores


def test_cartpole_in_50k_steps(tmp_path: Path) -> None:
    """500 is the most there is."""
    assert (mean_returns("cartpole", tmp_path, seeds=5) == 500).all()


def test_hopper_in_1m_steps(tmp_path: Path) -> None:
    assert mean_returns("hopper", tmp_path, seeds=3, episodes=50).mean() >= 2500
