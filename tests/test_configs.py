"""The files in configs/: every task has one, it lists only departures, each with its reason, and it trains."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gymnasium
import pytest
import torch
import yaml

from trpo.benchmark.learning import SUITES
from trpo.config.file import load_config, parse_config
from trpo.natural_gradient import Outcome, StepReport, trust_region_step
from trpo.run.saved_policy import load_policy
from trpo.trainer import Trainer

DIRECTORY = Path(__file__).parents[1] / "configs"
FILES = sorted(DIRECTORY.glob("*.yaml"))
TASKS = {
    "acrobot": "Acrobot-v1",
    "ant": "Ant-v5",
    "bipedal_walker": "BipedalWalker-v3",
    "cartpole": "CartPole-v1",
    "half_cheetah": "HalfCheetah-v5",
    "hopper": "Hopper-v5",
    "humanoid": "Humanoid-v5",
    "humanoid_standup": "HumanoidStandup-v5",
    "inverted_double_pendulum": "InvertedDoublePendulum-v5",
    "inverted_pendulum": "InvertedPendulum-v5",
    "lunar_lander": "LunarLander-v3",
    "lunar_lander_continuous": "LunarLanderContinuous-v3",
    "mountain_car": "MountainCar-v0",
    "mountain_car_continuous": "MountainCarContinuous-v0",
    "pendulum": "Pendulum-v1",
    "plain_trpo": "Hopper-v5",
    "pusher": "Pusher-v5",
    "reacher": "Reacher-v5",
    "swimmer": "Swimmer-v5",
    "walker2d": "Walker2d-v5",
}

UPDATES = 2
SMALL_RUN = (
    "env.num_envs=2",
    "batch_size=32",
    f"total_steps={UPDATES * 32}",
    "value.adam.epochs=1",
    "learning_starts=0",  # these updates are all there are
    "evaluation.final_episodes=1",
    "env.kwargs.max_episode_steps=20",  # else an episode of the final evaluation takes up to 1600 steps
)


def leaves(data: dict[str, Any], path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Settings by path; a schedule is one setting, whichever of its ends departs."""
    found: dict[tuple[str, ...], Any] = {}
    for key, value in data.items():
        inner = isinstance(value, dict) and value and "start" not in value
        found |= leaves(value, (*path, key)) if inner else {(*path, key): value}
    return found


def test_every_task_has_its_file() -> None:
    assert TASKS.items() <= {path.stem: load_config(path).env.id for path in FILES}.items()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_loads_for_a_registered_environment(path: Path) -> None:
    config = load_config(path)
    assert gymnasium.spec(config.env.id).id == config.env.id
    assert config.updates >= 10


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_lists_only_departures_from_the_defaults(path: Path) -> None:
    given = leaves(yaml.safe_load(path.read_text(encoding="utf-8")))
    env_id = given.pop(("env", "id"))
    defaults = leaves(parse_config(f"env: {{id: {env_id}}}").model_dump(by_alias=True))
    assert [key for key, value in given.items() if defaults.get(key, ...) == value] == []


OWN = {
    ("env", "id"),
    ("gae", "gamma"),
    ("total_steps",),
    ("evaluation", "every_steps"),
    ("evaluation", "final_episodes"),
}


@pytest.mark.parametrize("suite", SUITES)
def test_the_tasks_of_a_suite_share_one_recipe(suite: str) -> None:
    """Discount, length and what is evaluated are the task's own; nothing else is."""
    files = [leaves(yaml.safe_load((DIRECTORY / f"{task}.yaml").read_text("utf-8"))) for task in SUITES[suite]]
    first, *others = ({key: value for key, value in given.items() if key not in OWN} for given in files)
    assert others and all(recipe == first for recipe in others)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_departure_states_its_reason(path: Path) -> None:
    title, *lines = path.read_text(encoding="utf-8").splitlines()
    assert title.startswith("# ")
    settings = [line for line in lines if re.match(r"\s*[\w.]+: *[^\s#]", line) and not re.match(r"\s*id:", line)]
    assert [line for line in settings if not re.search(r"\s# \w", line)] == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_trains_to_a_policy_that_acts(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # MuJoCo writes its log to the working directory
    reports: list[StepReport] = []

    def noted_step(*args: Any, **kwargs: Any) -> StepReport:
        reports.append(trust_region_step(*args, **kwargs))
        return reports[-1]

    monkeypatch.setattr("trpo.agent.trust_region_step", noted_step)
    trainer = Trainer(load_config(path, SMALL_RUN), root=tmp_path, console=False)
    theta_start = trainer.agent.policy.theta.vector.clone()
    result = trainer.train()
    theta = trainer.agent.policy.theta.vector

    assert (result.env_steps, len(reports)) == (UPDATES * 32, UPDATES)
    # A refused update leaves θ bitwise as it was and names its outcome; an accepted one keeps to the bound.
    accepted = [report for report in reports if report.outcome is Outcome.ACCEPTED]
    assert torch.equal(theta, theta_start) == (not accepted), [report.reason for report in reports]
    assert all(report.kl <= report.max_kl for report in accepted)
    assert result.evaluation is not None and result.evaluation.lengths[0] <= 20

    saved = load_policy(result.directory / "final")
    assert torch.equal(saved.policy.theta.vector, theta)
    assert saved.action_space.contains(saved.act(trainer.collector.obs[0].numpy()))
