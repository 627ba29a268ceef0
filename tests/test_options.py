"""What environments are given in their resets, as a curriculum, and what they tell in the info of an episode's end."""

from __future__ import annotations

import math
import os
from contextlib import closing
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from test_resume import differences, last_state, resume, table

from trpo.config import Config, EnvConfig, EvaluationConfig, Schedule
from trpo.config.file import parse_config
from trpo.config.schedule import options_at
from trpo.envs import make_envs
from trpo.envs.vector import VectorEnvAdapter
from trpo.errors import ConfigError, EnvError, UserError
from trpo.evaluation import evaluate
from trpo.run.metrics import EVALUATIONS_FILE, PROGRESS_FILE
from trpo.run.saved_policy import load_policy
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
        ("{start: 1}", r"<text>:1: env.options.x.end: is required: a schedule has start and end"),
        ("{start: 1, end: far}", r"<text>:1: env.options.x.end: must be a valid number"),
        (
            "{start: 1, end: 2, pace: 3}",
            r"<text>:1: env.options.x.pace: is no part of a schedule, which has start, end and shape",
        ),
        (
            "{start: -1, end: 2, shape: geometric}",
            r"<text>:1: env.options.x: start: must be above 0 for shape geometric",
        ),
    ],
)
def test_a_schedule_that_is_none_is_one_line(option: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected) as error:
        parse_config(f"env: {{id: Pendulum-v1, options: {{x: {option}}}}}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("backend", [{"backend": "gymnasium"}, ASYNC], ids=["gymnasium", "async"])
def test_every_reset_has_them_as_gymnasium_takes_them(backend: dict[str, Any]) -> None:
    narrow, wide = {"low": -0.01, "high": 0.01}, {"low": 0.2, "high": 0.21}
    envs: Any = make_envs(EnvConfig(id="CartPole-v1", stagger=False, **backend), [3, 4])
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
    envs: Any = make_envs(EnvConfig(id="faulty_envs:Told-v0", **settings), [3])
    envs.set_options({"x": 7.0})
    envs.reset()
    envs._workers[0].process.kill()
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

    parts = train(tmp_path / "parts")
    Trainer(told, root=tmp_path, resume=parts, console=False, on_update=follow).train()
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
    best = load_policy(run / "best").info
    assert best["evaluation"]["eval/mean_reward"] == 50.0
    assert best["env_steps"] == 20  # the first of three that returned as much
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


def test_the_best_policy_of_another_task_sets_no_bar_however_often_the_run_goes_on(tmp_path: Path) -> None:
    """Until the first evaluation of the new task, `best/` is still of the old one."""
    rich, poor = (config({"x": 1.0}, {"kwargs": {"times": times}}) for times in (10.0, 1.0))
    run = Trainer(rich, root=tmp_path, console=False).train(max_updates=2).directory
    unjudged = poor.model_copy(update={"evaluation": EvaluationConfig(every_steps=0)})
    for _ in range(2):
        trainer = Trainer(unjudged, root=tmp_path, resume=run, console=False)
        assert trainer.best_return == -math.inf
        trainer.train(max_updates=1)


@pytest.mark.parametrize("backend", [{}, ASYNC], ids=["gymnasium", "async"])
def test_what_the_last_info_of_an_episode_tells_is_averaged(backend: dict[str, Any], tmp_path: Path) -> None:
    """Some episodes do not tell, and a text or a name that nobody knows tells nothing."""
    names = ["x squared", "sometimes", "text", "unknown"]
    told = config({"x": {"start": 0.0, "end": 2.0}}, {**backend, "info": names})
    run = Trainer(told, root=tmp_path, console=False).train(max_updates=3).directory
    whole = Trainer(told, root=tmp_path, resume=run, console=False)
    whole.train()
    by_update = [0.0, 0.5, 1.0, 1.5, 2.0]
    xs = [x for u in range(UPDATES) for x in [by_update[max(0, u - 1)]] * 2 + [by_update[u]] * 2]
    last = table(run, PROGRESS_FILE)[-1]
    assert float(last["rollout/info/x squared"]) == pytest.approx(np.mean(np.square(xs)))
    assert float(last["rollout/info/sometimes"]) == 2.0 and len(whole.recent.info["sometimes"]) == 6
    assert last["rollout/info/text"] == last["rollout/info/unknown"] == ""
    assert whole.evaluation is not None and whole.evaluation.info == {
        "x squared": [4.0, 4.0],
        "sometimes": [2.0, 2.0],
        "text": [],
        "unknown": [],
    }
    assert "x squared 4, sometimes 2" in str(whole.evaluation)
    final = table(run, EVALUATIONS_FILE)[-1]
    assert float(final["eval/info/x squared"]) == 4.0 and float(final["eval/info/sometimes"]) == 2.0


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
def test_so_it_is_of_vector_environments(mode: AutoresetMode) -> None:
    made = gymnasium.make_vec(
        "faulty_envs:Told-v0", 2, vectorization_mode="sync", vector_kwargs={"autoreset_mode": mode}
    )
    envs = VectorEnvAdapter(made, info=["x squared", "unknown"])
    envs.reset()
    steps = [envs.step(torch.zeros(2, 1, dtype=torch.int64)).info.isnan().tolist() for _ in range(5)]  # type: ignore
    assert steps == [[[True, True]] * 2] * 4 + [[[False, True]] * 2]


def test_the_batch_of_mujoco_computes_no_info_and_gymnasium_does(tmp_path: Path) -> None:
    env = {"id": "Hopper-v5", "info": ["x_position"], "num_envs": 2}
    trainer = Trainer(config({}, env), root=tmp_path, console=False)
    assert trainer.train(max_updates=2) and trainer.recent.info["x_position"]
    with pytest.raises(UserError, match=r"env.info: backend mujoco computes no info; .* set env.backend to gymnasium"):
        Trainer(config({}, {**env, "backend": "mujoco"}), root=tmp_path, console=False)


class Spoils(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Changes the options it is given, deep inside, as environments may."""

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        options["x"] = options["nested"]["place"][0]
        options["nested"]["place"][0] += 1
        return self.env.reset(seed=seed, options=options)


def test_what_an_environment_does_with_them_is_its_own_affair(tmp_path: Path) -> None:
    options = {"nested": {"place": [1.0]}}
    told = config(options, {"wrappers": [{"name": "test_options:Spoils"}]})
    run = Trainer(told, root=tmp_path, console=False).train().directory
    assert told.env.options == options == {"nested": {"place": [1.0]}}
    assert (
        means(run, PROGRESS_FILE, "rollout/ep_rew_mean")
        == means(run, EVALUATIONS_FILE, "eval/mean_reward")
        == [5.0] * 5
    )


def test_a_killed_run_knows_what_it_was_last_told_and_how_it_was_judged(tmp_path: Path) -> None:
    """From the checkpoint that an update leaves, not from one of an orderly end."""

    def follow(trainer: Trainer, _: object) -> None:
        if trainer.evaluation is not None:  # every two updates
            trainer.options = {"x": trainer.options.get("x", 0.0) + len(trainer.evaluation.returns)}

    class Killed(BaseException):
        pass

    def killed(trainer: Trainer, report: object) -> None:
        if trainer.updates == 4:
            raise Killed
        follow(trainer, report)

    told = config({"y": 1.0}, evaluation={"every_steps": 40, "episodes": 2, "final_episodes": 2})
    whole = Trainer(told, root=tmp_path / "whole", console=False, on_update=follow).train().directory
    source = Trainer(told, root=tmp_path / "killed", console=False, on_update=killed)
    with pytest.raises(Killed):
        source.train()
    run = source.run.path
    assert last_state(run)["options"] == {"x": 4.0} and last_state(run)["counters"]["updates"] == 3
    Trainer(told, root=tmp_path, resume=run, console=False, on_update=follow).train()
    assert differences(last_state(whole)["agent"], last_state(run)["agent"]) == []
    assert last_state(run)["options"] == last_state(whole)["options"] == {"x": 8.0}
    assert "note: resets are given {'x': 4.0} over env.options, as on_update had set" in (run / "log.txt").read_text()


@pytest.mark.parametrize("bad", [{"x": {1.0, 2.0}}, {"x": object()}, None])
def test_options_that_no_checkpoint_can_hold_are_refused_and_what_was_trained_is_saved(
    bad: dict[str, Any], tmp_path: Path
) -> None:
    def spoil(trainer: Trainer, _: object) -> None:
        trainer.options = bad if trainer.updates == 2 else {"x": np.ones(())}

    source = Trainer(config({}, checkpoint={"every_steps": 0}), root=tmp_path, console=False, on_update=spoil)
    with pytest.raises(UserError, match=r"trainer.options are not what a checkpoint can hold: "):
        source.train()
    assert (
        last_state(source.run.path)["counters"]["updates"] == 2 and last_state(source.run.path)["options"]["x"] == 1.0
    )


def test_a_caller_that_raises_is_heard_whatever_options_it_left_and_what_was_trained_is_saved(tmp_path: Path) -> None:
    def fail(trainer: Trainer, _: object) -> None:
        trainer.options = {"x": object()}
        raise ZeroDivisionError("mine")

    source = Trainer(config({}, checkpoint={"every_steps": 0}), root=tmp_path, console=False, on_update=fail)
    with pytest.raises(ZeroDivisionError, match="mine"):
        source.train()
    assert last_state(source.run.path)["counters"]["updates"] == 1 and last_state(source.run.path)["options"] == {}


def test_options_made_unfit_in_place_are_saved_as_they_were_before(tmp_path: Path) -> None:
    def spoil(trainer: Trainer, _: object) -> None:
        trainer.options.setdefault("map", {})["rooms"] = object() if trainer.updates == 2 else 3

    source = Trainer(config({}, checkpoint={"every_steps": 0}), root=tmp_path, console=False, on_update=spoil)
    with pytest.raises(UserError, match=r"trainer.options are .* hold: state/options/map/rooms: object"):
        source.train()
    state = last_state(source.run.path)
    assert state["counters"]["updates"] == 2 and state["options"] == {"map": {"rooms": 3}}


def test_options_that_are_taken_back_are_given_no_more(tmp_path: Path) -> None:
    returns: list[float] = []

    def tell(trainer: Trainer, _: object) -> None:
        trainer.options = {"x": 1.0} if trainer.updates == 2 else {}
        returns.extend(list(trainer.recent.returns)[-4:])

    Trainer(config({}), root=tmp_path, console=False, on_update=tell).train()
    # Of the two episodes that each environment ends in an update, the first was begun in the update before.
    assert returns == [0.0] * 10 + [5.0] * 4 + [0.0] * 6


def test_options_changed_in_place_leave_the_record_of_the_running_episodes_alone(tmp_path: Path) -> None:
    """By which these are replayed."""

    def widen(trainer: Trainer, _: object) -> None:
        trainer.options.setdefault("map", {})["rooms"] = trainer.updates

    run = Trainer(config({}), root=tmp_path, console=False, on_update=widen).train(max_updates=2).directory
    state = last_state(run)
    assert state["options"] == {"map": {"rooms": 2}}
    begun = [env["options"] for env in state["processes"][0]["collector"]["env"]["envs"]]
    assert begun == [{"map": {"rooms": 1}}] * 2


class Restless(gymnasium.ObservationWrapper[Any, Any, Any]):
    """Draws from the operating system, so that no episode can be replayed."""

    def observation(self, observation: Any) -> Any:
        return np.array([observation[0], int.from_bytes(os.urandom(4))], np.float64)


@pytest.mark.parametrize("times", [1.0, 2.0], ids=["cannot be replayed", "of another task"])
def test_episodes_begun_anew_on_a_resume_have_the_options_of_the_update_to_come(times: float, tmp_path: Path) -> None:
    def told(times: float) -> Config:
        env = {"kwargs": {"times": times}, "wrappers": [{"name": "test_options:Restless"}]}
        return config({"x": {"start": 1.0, "end": 3.0}}, env)

    run = Trainer(told(1.0), root=tmp_path, console=False).train(max_updates=3).directory
    with closing(Trainer(told(times), root=tmp_path, resume=run, console=False)) as trainer:
        assert not trainer.collector.goes_on
        assert trainer.collector.obs[:, 0].tolist() == [2.5, 2.5]  # three quarters of the way


def test_options_for_environments_made_by_hand_that_take_none_are_refused(tmp_path: Path) -> None:
    class Deaf(VectorEnvAdapter):
        set_options = None  # type: ignore[assignment]

    def tell(trainer: Trainer, _: object) -> None:
        trainer.options = {"x": 1.0}

    given = Deaf(gymnasium.make_vec("faulty_envs:Told-v0", 2, vectorization_mode="sync"))
    source = Trainer(config({}), root=tmp_path, console=False, env=given, on_update=tell)
    with pytest.raises(UserError, match=r"trainer.options: resets of Deaf take none; give it set_options"):
        source.train()


def test_the_end_of_a_schedule_is_reached_to_the_bit_and_a_schedule_may_be_an_object() -> None:
    """0.31 by a straight line from 1.47 rounds to more, which an environment may not take."""
    assert 1.47 + 1.0 * (0.31 - 1.47) > 0.31
    given = EnvConfig(id="CartPole-v1", options={"x": {"start": 1.47, "end": 0.31}, "y": Schedule(start=1, end=3)})
    assert options_at(given.options, 1.0) == {"x": 0.31, "y": 3.0}
    assert options_at(given.options, 0.5)["y"] == 2.0


def test_what_changes_no_evaluation_leaves_the_best_policy_and_what_changes_no_episode_the_episodes(
    tmp_path: Path,
) -> None:
    """A tuple, which a checkpoint has as a list; a wrapper for training only; another start of a schedule."""
    env = {"id": "Hopper-v5", "kwargs": {"healthy_z_range": (0.7, 2.0)}, "info": ["x_position"]}
    run = Trainer(config({"x": {"start": 0.0, "end": 1.0}}, env), root=tmp_path, console=False).train(max_updates=2)
    best = last_state(run.directory)["counters"]["best_return"]

    def resumed(options: dict[str, Any], **more: Any) -> Trainer:
        return Trainer(config(options, {**env, **more}), root=tmp_path, resume=run.directory, console=False)

    with closing(resumed({"x": {"start": 0.0, "end": 1.0}})) as same:
        assert same.collector.goes_on and same.best_return == best and same.evaluation is not None
    with closing(resumed({"x": {"start": 0.5, "end": 1.0}})) as later:
        assert later.collector.goes_on and later.best_return == best
    shaped = [{"name": "gymnasium.wrappers:ClipReward", "kwargs": {"max_reward": 0.5}, "training_only": True}]
    with closing(resumed({"x": {"start": 0.0, "end": 1.0}}, wrappers=shaped)) as other:
        assert not other.collector.goes_on and other.best_return == best
    with closing(resumed({"x": {"start": 0.0, "end": 2.0}})) as harder:
        assert harder.collector.goes_on and harder.best_return == -math.inf and harder.evaluation is None
    with pytest.raises(UserError, match=r"the state holds 2 environments, this run has 4"):
        resumed({"x": {"start": 0.0, "end": 1.0}}, wrappers=shaped, num_envs=4)


def test_a_finished_run_refuses_another_task_before_it_begins_anything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Trainer(config({}), root=tmp_path, console=False).train().directory
    with pytest.raises(UserError, match=r"is finished; raise total_steps too, to train on with env.kwargs.times"):
        Trainer(config({}, {"kwargs": {"times": 2.0}}), root=tmp_path, resume=run, console=False)
    assert "new episodes" not in capsys.readouterr().err


def test_environments_made_by_hand_may_take_options_and_need_tell_nothing_else(tmp_path: Path) -> None:
    class ByHand:
        """What `BatchEnv` asks for and no more, but for `set_options`."""

        def __init__(self) -> None:
            self._envs: Any = make_envs(EnvConfig(id="faulty_envs:Told-v0", stagger=False), [1, 2])

        def __getattr__(self, name: str) -> Any:
            if name == "unflattened_observation_space":
                raise AttributeError(name)
            return getattr(self._envs, name)

    told: Any = VectorEnvAdapter(gymnasium.make_vec("faulty_envs:Told-v0", 2, vectorization_mode="sync"))
    run = Trainer(config({"x": 3.0}), root=tmp_path, console=False, env=told).train().directory
    assert {*means(run, EVALUATIONS_FILE, "eval/mean_reward")} == {15.0}  # which are of the config's
    by_hand: Any = ByHand()
    run = Trainer(config({"x": 3.0}), root=tmp_path, console=False, env=by_hand).train().directory
    assert means(run, PROGRESS_FILE, "rollout/ep_rew_mean") == [15.0] * UPDATES
    assert load_policy(run).observation_space is None


def test_a_worker_that_dies_before_it_is_told_costs_no_update(tmp_path: Path) -> None:
    def kill(trainer: Trainer, _: object) -> None:
        if trainer.updates == 2:
            envs: Any = trainer.env
            envs._workers[0].process.kill()
            envs._workers[0].process.wait()

    told = config({"x": {"start": 0.0, "end": 1.0}}, ASYNC, checkpoint={"every_steps": 0})
    source = Trainer(told, root=tmp_path, console=False, on_update=kill)
    with pytest.raises(EnvError, match="killed by SIGKILL"):
        source.train()
    assert last_state(source.run.path)["counters"]["updates"] == 2
