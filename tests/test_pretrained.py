"""The policies shipped under pretrained/: each is there and loads, and one does what its record says."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from trpo.evaluation import evaluate
from trpo.run.saved_policy import load_policy

ROOT = Path(__file__).parents[1] / "pretrained"
RECORDS = json.loads((ROOT / "index.json").read_text())


@pytest.mark.parametrize("environment", RECORDS)
def test_every_policy_loads_for_its_environment(environment: str) -> None:
    saved = load_policy(ROOT / environment)
    assert saved.environment().id == environment
    assert saved.info["seed"] == RECORDS[environment]["seed"]


def test_one_reaches_its_recorded_return() -> None:
    record = RECORDS["Walker2d-v5"]
    saved = load_policy(ROOT / "Walker2d-v5")
    result = evaluate(saved.policy, saved.environment(), saved.action_space, episodes=5, seed=0, deterministic=True)
    # The mean of 5 episodes against that of 20: four standard errors of the difference.
    assert abs(result.mean - record["mean"]) <= 4 * record["std"] * math.sqrt(1 / 5 + 1 / record["episodes"]) + 1
