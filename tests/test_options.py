"""Options of resets: what environments are given, as a curriculum, from the first update of a run to its last."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from test_resume import differences, last_state, resume, table

from trpo.config import Config, EnvConfig
from trpo.config_file import parse_config
from trpo.envs import make_envs
from trpo.envs.contract import TakesOptions
from trpo.errors import ConfigError, UserError
from trpo.evaluation import evaluate
from trpo.metrics import EVALUATIONS_FILE, PROGRESS_FILE
from trpo.saved_policy import load_policy
from trpo.schedule import options_at
from trpo.trainer import Trainer

UPDATES = 5
ASYNC = {"backend": "gymnasium-async", "workers": 2}


def config(options: dict[str, Any], env: dict[str, Any] | None = None, **changes: Any) -> Config:
    """Five updates of four episodes each."""
    settings: dict[str, Any] = {
        "env": {"id": "faulty_envs:Told-v0", "num_envs": 2, "stagger": False, "options": options, **(env or {})},
        "total_steps": 20 * UPDATES,
        "batch_size": 20,
        "device": "cpu",
        "policy": {"hidden_sizes": (8,)},
        "evaluation": {"every_steps": 20, "episodes": 2, "final_episodes": 2},
        "checkpoint": {"every_steps": 20},
    }
    return Config.model_validate({**settings, **changes})


def means(run: Path, name: str, column: str) -> list[float]:
    return [float(row[column]) for row in table(run, name)]


def test_numbers_may_be_scheduled_and_anything_else_is_as_it_is() -> None:
    options = {
        "x": {"start": -1.0, "end": 3.0},
        "slow": {"start": 1.0, "end": 100.0, "shape": "geometric"},
        "map": {"rooms": 3},
        "level": "easy",
    }
    kept = {"map": {"rooms": 3}, "level": "easy"}
    assert options_at(options, 0.0) == {"x": -1.0, "slow": 1.0, **kept}
    assert options_at(options, 0.5) == {"x": 1.0, "slow": pytest.approx(10.0), **kept}
    assert options_at(options, 1.0) == {"x": 3.0, "slow": 100.0, **kept}
    assert options_at({}, 0.3) == {}


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("{start: 1}", r"<text>:1: env.options.x.end: .*required"),
        ("{start: 1, end: far}", r"<text>:1: env.options.x.end: .*number"),
        ("{start: 1, end: 2, pace: 3}", r"<text>:1: env.options.x.pace: .*not permitted"),
        ("{start: -1, end: 2, shape: geometric}", r"<text>:1: env.options.x.*geometric takes"),
    ],
)
def test_a_schedule_that_is_none_is_one_line(option: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected) as error:
        parse_config(f"env: {{id: Pendulum-v1, options: {{x: {option}}}}}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("backend", [{"backend": "gymnasium"}, ASYNC], ids=["gymnasium", "async"])
def test_every_reset_has_them_as_gymnasium_takes_them(backend: dict[str, Any]) -> None:
    narrow, wide = {"low": -0.01, "high": 0.01}, {"low": 0.2, "high": 0.21}
    envs = make_envs(EnvConfig(id="CartPole-v1", stagger=False, **backend), [3, 4])
    assert isinstance(envs, TakesOptions)
    envs.set_options(narrow)
    expected = [gymnasium.make("CartPole-v1") for _ in range(2)]
    first = [env.reset(seed=seed, options=narrow)[0] for env, seed in zip(expected, (3, 4), strict=True)]
    assert torch.equal(envs.reset(), torch.tensor(np.stack(first)))
    envs.set_options(wide)
    ended = torch.zeros(2, dtype=torch.bool)
    while not ended.all():  # in the next episodes, not in those that run
        step = envs.step(torch.ones(2, 1, dtype=torch.int64))
        for i, env in enumerate(expected):
            obs, _, terminated, truncated, _ = env.step(1)
            assert torch.equal(step.next_obs[i], torch.tensor(obs))
            if terminated or truncated:
                obs, _ = env.reset(options=wide)
                assert obs.min() >= 0.2 and torch.equal(step.reset_obs[i], torch.tensor(obs))
                ended[i] = True
    envs.close()


def test_a_worker_that_takes_the_place_of_another_has_them_too() -> None:
    settings = {"on_worker_failure": "restart", "backend": "gymnasium-async", "workers": 1}
    envs = make_envs(EnvConfig(id="faulty_envs:Told-v0", **settings), [3])
    assert isinstance(envs, TakesOptions)
    envs.set_options({"x": 7.0})
    envs.reset()
    envs._workers[0].process.kill()  # type: ignore[attr-defined]
    assert envs.step(torch.zeros(1, 1, dtype=torch.int64)).reset_obs.tolist() == [[7.0, 0.0]]
    envs.close()


@pytest.mark.parametrize("backend", [{}, ASYNC], ids=["gymnasium", "async"])
def test_a_run_goes_from_their_start_to_their_end_and_is_judged_by_the_end(
    backend: dict[str, Any], tmp_path: Path
) -> None:
    told = config({"x": {"start": 1.0, "end": 3.0}}, backend)
    returns: list[float] = []

    def note(trainer: Trainer, _: object) -> None:
        returns.extend(list(trainer.recent.returns)[-4:])

    run = Trainer(told, root=tmp_path, console=False, on_update=note).train().directory
    # The second episode of an update is the last that begins in it: the first of the next was begun with its options.
    by_update = [1.0, 1.5, 2.0, 2.5, 3.0]
    expected = [[5 * (by_update[max(0, u - 1)])] * 2 + [5 * by_update[u]] * 2 for u in range(UPDATES)]
    assert returns == pytest.approx([x for part in expected for x in part])
    assert means(run, EVALUATIONS_FILE, "eval/mean_reward") == [15.0] * UPDATES
    assert (
        evaluate(load_policy(run).policy, told.env, load_policy(run).action_space, episodes=3, seed=0).returns
        == [15.0] * 3
    )


@pytest.mark.parametrize("backend", [{}, ASYNC], ids=["gymnasium", "async"])
def test_stop_and_resume_is_the_undisturbed_curriculum(backend: dict[str, Any], tmp_path: Path) -> None:
    """One option by schedule, another by what the policy can do: 22 steps an update leave episodes unfinished."""
    changes = {"batch_size": 22, "total_steps": 22 * UPDATES, "checkpoint": {"every_steps": 22}}
    told = config({"y": {"start": 0.0, "end": 1.0}}, backend, **changes)

    def follow(trainer: Trainer, _: object) -> None:
        trainer.options = {"x": trainer.options.get("x", 0.0) + 0.5}

    def train(root: Path, **more: Any) -> Path:
        return Trainer(told, root=root, console=False, on_update=follow, **more).train(max_updates=3).directory

    whole, parts = train(tmp_path / "whole"), train(tmp_path / "parts")
    for run in (whole, parts):
        Trainer(told, root=tmp_path, resume=run, console=False, on_update=follow).train()
    undisturbed = Trainer(told, root=tmp_path / "all", console=False, on_update=follow).train().directory
    assert differences(last_state(undisturbed)["agent"], last_state(parts)["agent"]) == []
    assert table(undisturbed, PROGRESS_FILE) == table(parts, PROGRESS_FILE)
    assert last_state(parts)["options"] == {"x": 2.5}
    begun = [env["options"] for env in last_state(parts)["processes"][0]["collector"]["env"]["envs"]]
    assert [options["x"] for options in begun] == [2.0, 2.0] and all(options["y"] == 1.0 for options in begun)


def test_backends_whose_resets_take_none_say_so(tmp_path: Path) -> None:
    env = {"id": "Pendulum-v1", "backend": "torch"}
    with pytest.raises(UserError, match=r"env.options: resets of TorchEnvs take none; .* set env.backend to gymnasium"):
        Trainer(config({"x": 1.0}, env), root=tmp_path, console=False)


def test_another_task_has_new_episodes_and_a_best_policy_of_its_own(tmp_path: Path) -> None:
    rich, poor = (config({"x": 1.0}, {"kwargs": {"times": times}}) for times in (10.0, 1.0))
    run = Trainer(rich, root=tmp_path, console=False).train(max_updates=3).directory
    assert load_policy(run / "best").info["evaluation"]["eval/mean_reward"] == 50.0
    Trainer(poor, root=tmp_path, resume=run, console=False).train()
    assert load_policy(run / "best").info["evaluation"]["eval/mean_reward"] == 5.0
    log = (run / "log.txt").read_text()
    assert "the environment is another one; the run goes on with new episodes" in log
    assert "evaluations are of another task from now on, and the first of them replaces best/" in log
    assert means(run, EVALUATIONS_FILE, "eval/mean_reward") == [50.0] * 3 + [5.0] * 2
    # What was not of the task leaves both alone.
    again = Trainer(config({"x": 1.0}), root=tmp_path / "again", console=False).train(max_updates=3).directory
    longer = config({"x": 1.0}, checkpoint={"every_steps": 40})
    trainer = Trainer(longer, root=tmp_path, resume=again, console=False)
    assert trainer.best_return == 5.0 and trainer.collector.goes_on
    trainer.close()
    assert math.isfinite(last_state(resume(again).directory)["counters"]["best_return"])
