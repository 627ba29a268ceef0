"""What the trainer hands on from the settings to the parts that no other test builds through it."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from commands import config_for
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_env_workers import GONE_S, wait_until_gone
from test_resume import table
from torch import Tensor

from trpo import native
from trpo.agent import Agent, UpdateReport
from trpo.analysis.curves import read_curve
from trpo.batch import Batch, Rollout
from trpo.colored_noise import ColoredNoise
from trpo.config import CheckpointConfig, Config, EnvConfig, EvaluationConfig
from trpo.config.file import load_config
from trpo.envs import make_envs
from trpo.envs.vector import VectorEnvAdapter
from trpo.errors import EnvError, TrainingError, UserError
from trpo.evaluation import evaluate
from trpo.native import library
from trpo.natural_gradient import Outcome
from trpo.run.checkpoint import checkpoint_paths
from trpo.run.messages import Messages
from trpo.run.metrics import PROGRESS_FILE, RECORDED_FILE
from trpo.run.saved_policy import load_policy
from trpo.runtime.random_streams import stream_seed
from trpo.trainer import Trainer


class Unseen(gymnasium.Wrapper[Any, Any, Any, Any]):
    metadata = {"render_modes": []}  # noqa: RUF012 - as Gymnasium declares it


class Shaped(gymnasium.RewardWrapper[Any, Any]):
    def reward(self, reward: Any) -> float:
        return 1.0


class Widened(gymnasium.ObservationWrapper[Any, Any, Any]):
    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        super().__init__(env)
        self.observation_space = gymnasium.spaces.Box(-8, 8, (6000,), np.float32)

    def observation(self, observation: Any) -> Any:
        return np.tile(observation, 2000)


def trainer_config(updates: int, **policy: Any) -> Config:
    return config_for(
        "Pendulum-v1",
        env={"id": "Pendulum-v1", "num_envs": 2},
        total_steps=64 * updates,
        batch_size=64,
        device="cpu",
        policy={"hidden_sizes": (8,), **policy},
        value={"hidden_sizes": (8,)},
    )


def trainer(root: Path, *, updates: int = 3, **policy: Any) -> Trainer:
    return Trainer(trainer_config(updates, **policy), root=root, console=False)


def test_actions_get_noise_of_the_color_that_the_settings_name(tmp_path: Path) -> None:
    noise = []
    for exponent in (0.0, 1.0):
        with closing(trainer(tmp_path, noise_exponent=exponent)) as source:
            source.collector.collect()
            noise.append(source.collector.noise)
    assert torch.equal(noise[1], ColoredNoise(32, 1.0, like=noise[0])(noise[0]))


@pytest.mark.skipif(not native.available(), reason="torch's own products depend on its threads")
@pytest.mark.parametrize("fit_first", [False, True])
def test_a_run_has_the_same_bits_whatever_the_threads(
    fit_first: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the settings, of the cores that there are, and those that torch had when the networks were made.

    Enough parameters for torch to share their dot products, had it threads to do so.
    """
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr("trpo.runtime.cores._CGROUP", tmp_path)
    before, thetas = torch.get_num_threads(), []
    for count, given in [(1, 1), (2, 2), (3, 3), (0, 4)]:
        config = config_for(
            "Pendulum-v1",
            total_steps=1024,
            batch_size=512,
            device="cpu",
            threads=count,
            policy={"hidden_sizes": [64, 256]},
            value={"fit_first": fit_first},
        )
        torch.set_num_threads(given)
        try:
            with closing(Trainer(config, root=tmp_path, console=False)) as source, source.torch_for_training():
                assert (torch.get_num_threads(), library.threads()) == (1, given)
                for _ in range(2):
                    source.iteration()
                thetas.append(torch.cat([source.agent.policy.theta.vector, source.agent.value.theta.vector]))
        finally:
            torch.set_num_threads(before)
    assert all(torch.equal(theta, thetas[0]) for theta in thetas)


@pytest.mark.parametrize("different", [{"dtype": "float64"}, {"policy": {"activation": "silu"}}], ids=str)
def test_torch_has_several_threads_only_where_the_settings_say_so(
    different: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its numbers depend on them, and by default none do on the machine's cores."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr("trpo.runtime.cores._CGROUP", tmp_path)
    for count, expected in [(0, (1, 1)), (3, (2, 3))]:  # one fits V
        config = config_for("Pendulum-v1", device="cpu", threads=count, **different)
        with closing(Trainer(config, root=tmp_path, console=False)) as source, source.torch_for_training():
            assert (torch.get_num_threads(), library.threads()) == expected


def test_a_closed_trainer_does_not_train_on(tmp_path: Path) -> None:
    source = trainer(tmp_path)
    source.train(max_updates=1)
    with pytest.raises(RuntimeError, match=r"this trainer is closed; go on with Trainer\(config, resume="):
        source.train(max_updates=1)
    assert source.updates == 1


def test_episodes_that_were_cut_to_stagger_them_are_no_returns(tmp_path: Path) -> None:
    """Pendulum-v1 ends no episode before its 200 steps, but for the first of each environment."""
    with closing(trainer(tmp_path, updates=20)) as source:
        for _ in range(14):
            source.iteration()
    assert set(source.recent.lengths) == {200}


def test_environments_made_by_hand_as_the_settings_say_leave_out_what_they_cut(tmp_path: Path) -> None:
    config = trainer_config(20)
    given = make_envs(config.env, list(range(config.env.num_envs)))
    with closing(Trainer(config, root=tmp_path, console=False, env=given)) as source:
        for _ in range(14):
            source.iteration()
    assert set(source.recent.lengths) == {200}


def test_episodes_of_environments_made_by_hand_all_count(tmp_path: Path) -> None:
    given = VectorEnvAdapter(gymnasium.make_vec("Pendulum-v1", 2), seed=0)
    config = config_for("Pendulum-v1", env={"id": "Pendulum-v1", "num_envs": 2}, total_steps=2048, batch_size=512)
    with closing(Trainer(config, root=tmp_path, console=False, env=given)) as source:
        source.iteration()
        assert list(source.recent.lengths) == [200, 200]  # of 256 steps


def test_an_evaluation_of_what_has_no_end_is_cut_where_the_settings_say(tmp_path: Path) -> None:
    settings = {"id": "CartPole-v1", "kwargs": {"max_episode_steps": -1}}  # Gymnasium's way to ask for no time limit
    config = config_for("CartPole-v1", env=settings, evaluation={"max_episode_steps": 3})
    with closing(Trainer(config, root=tmp_path, console=False)) as source:
        result = source._evaluate(2)
        said = "2 of 2 episodes were cut after 3 steps, evaluation.max_episode_steps"
        assert said in (source.run.path / "log.txt").read_text()
    assert result is not None and (result.lengths, result.cut) == ([3, 3], 2)


def test_each_evaluation_is_recorded_where_asked_for(tmp_path: Path) -> None:
    config = config_for(
        "CartPole-v1",
        total_steps=128,
        batch_size=64,
        evaluation={"video": True, "every_steps": 64, "episodes": 1, "final_episodes": 1},
    )
    result = Trainer(config, root=tmp_path, console=False).train()
    videos = sorted((result.directory / "videos").iterdir())
    assert [path.name for path in videos] == ["step-000000064.mp4", "step-000000128.mp4"]
    assert all(path.stat().st_size > 0 for path in videos)


def test_a_video_that_cannot_be_written_costs_nothing_else(tmp_path: Path) -> None:
    config = config_for("CartPole-v1", evaluation={"video": True})
    with closing(Trainer(config, root=tmp_path, console=False)) as source:
        source.run.videos.write_text("in the way")
        assert source._evaluate(2) is not None
        assert "warning: this evaluation has no video: " in (source.run.path / "log.txt").read_text()


def test_what_cannot_be_recorded_is_said_before_anything_is_trained(tmp_path: Path) -> None:
    settings = {"id": "Pendulum-v1", "wrappers": [{"name": "test_trainer:Unseen"}]}
    config = config_for("Pendulum-v1", env=settings, evaluation={"video": True})
    with pytest.raises(UserError, match="no rgb_array among its render modes"):
        Trainer(config, root=tmp_path, console=False)
    assert not any(tmp_path.iterdir())


def test_the_caller_sees_every_update_and_may_stop_the_run(tmp_path: Path) -> None:
    config = config_for("Pendulum-v1", total_steps=4 * 64, batch_size=64, device="cpu", evaluation={"every_steps": 64})
    seen = []

    def watch(source: Trainer, report: UpdateReport) -> bool:
        assert source.run.best.is_dir()  # evaluated already
        seen.append((source.updates, report.transitions, report.step.outcome))
        assert source.progress == source.updates / 3
        return source.updates == 2

    result = Trainer(config, root=tmp_path, console=False, on_update=watch).train()
    assert seen == [(1, 64, Outcome.ACCEPTED), (2, 64, Outcome.ACCEPTED)]
    assert result.env_steps == 128 and result.evaluation is None and result.exit_status == 0
    assert "stopped by its caller at 128 steps" in (result.directory / "log.txt").read_text()
    rest = Trainer(
        config, resume=result.directory, console=False, on_update=lambda source, _: seen.append(source)
    ).train()
    assert rest.env_steps == 256 and rest.evaluation is not None and len(seen) == 4


def test_the_policy_takes_its_first_step_after_so_many_steps(tmp_path: Path) -> None:
    """The rollouts that begin at steps 0 and 64 leave it alone, and the run says nothing of skipped updates."""
    config = config_for("CartPole-v1", total_steps=4 * 64, batch_size=64, device="cpu", learning_starts=65)
    outcomes, thetas = [], []

    def watch(source: Trainer, report: UpdateReport) -> None:
        outcomes.append(report.step.outcome)
        thetas.append(source.agent.policy.theta.vector.clone())

    source = Trainer(config, root=tmp_path, console=False, on_update=watch)
    first = source.agent.policy.theta.vector.clone()
    run = source.train().directory
    assert outcomes == [Outcome.RESTED, Outcome.RESTED, Outcome.ACCEPTED, Outcome.ACCEPTED]
    assert [torch.equal(theta, first) for theta in thetas] == [True, True, False, False]
    assert source.skipped_updates == 0 and "unchanged" not in (run / "log.txt").read_text()
    rows = table(run, PROGRESS_FILE)
    for tag in ("train/is_line_search_success", "train/kl_divergence_loss", "trust_region/max_kl"):
        assert [row[tag] == "" for row in rows] == [True, True, False, False], tag
    assert all(row["train/value_loss"] and row["trust_region/entropy"] for row in rows)


@pytest.mark.parametrize("answer", [1.0, "yes", np.array([False, False]), ZeroDivisionError("mine")])
def test_a_caller_that_raises_or_answers_neither_true_nor_false_ends_the_run_with_a_checkpoint(
    answer: Any, tmp_path: Path
) -> None:
    config = config_for("Pendulum-v1", total_steps=256, batch_size=64, device="cpu", evaluation={"final_episodes": 1})
    raises = isinstance(answer, Exception)

    def watch(source: Trainer, report: UpdateReport) -> Any:
        if raises and source.updates == 2:
            raise answer
        return None if raises else answer

    source = Trainer(config, root=tmp_path, console=False, on_update=watch)
    with pytest.raises(ZeroDivisionError if raises else TypeError, match="mine" if raises else "True stops the run"):
        source.train()
    seen: list[int] = []

    def count(source: Trainer, _: UpdateReport) -> Any:
        seen.append(source.updates)
        assert source.progress == min(1, source.updates / 3)  # after the last one there is none to come
        return np.bool_(False)

    rest = Trainer(config, resume=source.run.path, console=False, on_update=count).train()
    assert rest.env_steps == 256 and seen == ([3, 4] if raises else [2, 3, 4])


def test_settings_without_effect_are_remarked_upon(tmp_path: Path) -> None:
    config = config_for("Pendulum-v1", value={"gauss_newton": {"iterations": 5}})
    with closing(Trainer(config, root=tmp_path, console=False)) as source:
        said = (source.run.path / "log.txt").read_text()
        assert 'note: no effect: value.gauss_newton.iterations, while value.fit is "adam"' in said


def test_a_run_in_which_the_policy_never_learns_is_remarked_upon(tmp_path: Path) -> None:
    for begins, said in ((64, False), (65, True)):
        config = config_for("Pendulum-v1", total_steps=128, batch_size=64, learning_starts=begins)
        with closing(Trainer(config, root=tmp_path, console=False)) as source:
            log = (source.run.path / "log.txt").read_text()
            assert ("will not learn: the last rollout begins at step 64" in log) is said


def test_observations_as_large_as_images_are_remarked_upon(tmp_path: Path) -> None:
    settings = {"id": "Pendulum-v1", "wrappers": [{"name": "test_trainer:Widened"}]}
    with closing(Trainer(config_for("Pendulum-v1", env=settings), root=tmp_path, console=False)) as source:
        assert "6000 components of an observation" in (source.run.path / "log.txt").read_text()


def test_a_finished_run_keeps_the_settings_it_was_trained_with(tmp_path: Path) -> None:
    config = config_for("CartPole-v1", total_steps=128, batch_size=64, evaluation={"final_episodes": 1})
    run = Trainer(config, root=tmp_path, console=False).train().directory
    settings = (run / "config.yaml").read_text()
    with pytest.raises(UserError, match=r"is finished; raise total_steps too, to train on with gae.gamma: "):
        Trainer(load_config(run / "config.yaml", ["gae.gamma=0.9"]), resume=run, console=False)
    with pytest.raises(UserError, match="seed cannot change within a run"):
        Trainer(load_config(run / "config.yaml", ["seed=3", "total_steps=192"]), resume=run, console=False)
    assert (run / "config.yaml").read_text() == settings
    changes = ["gae.gamma=0.9", "total_steps=192"]
    result = Trainer(load_config(run / "config.yaml", changes), resume=run, console=False).train()
    assert result.env_steps == 192 and load_config(run / "config.yaml").gae.gamma == 0.9


def test_a_given_std_acts_from_its_first_value_to_its_last(tmp_path: Path) -> None:
    acted = []
    with closing(trainer(tmp_path, bins=None, std={"start": 0.5, "end": 0.1})) as source:
        collect = source.collector.collect

        def observed() -> Any:
            acted.append(source.agent.policy.std())
            return collect()

        source.collector.collect = observed  # type: ignore[method-assign]
        for _ in range(3):
            source.iteration()
    assert acted == pytest.approx([0.5, 0.3, 0.1], rel=1e-6)  # float32


def test_a_run_may_start_from_the_policy_of_another(tmp_path: Path) -> None:
    origin = load_policy(trainer(tmp_path, updates=2).train().directory)
    with closing(
        Trainer(origin.config.model_copy(update={"seed": 5}), root=tmp_path, console=False, start_from=origin.path)
    ) as new:
        assert torch.equal(new.agent.policy.theta.vector, origin.policy.theta.vector)
        assert f"starts from {origin.path}, a policy of Pendulum-v1" in (new.run.path / "log.txt").read_text()
        rollout, _ = new.collector.collect()
        noise = new.collector.noise
        assert torch.equal(rollout.action[0], origin.policy.sample(rollout.obs[0], noise[0]))
        with pytest.raises(UserError, match="a run that goes on has a policy already"):
            Trainer(origin.config, root=tmp_path, console=False, resume=new.run.path, start_from=origin.path)


def test_it_leaves_torch_as_many_threads_as_it_had(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    seen = []
    torch.set_num_threads(before + 1)
    try:
        one, other = trainer(tmp_path, updates=1), trainer(tmp_path, updates=1)
        one.on_update = lambda *_: seen.append(torch.get_num_threads())
        one.train()
        assert seen == [1] and torch.get_num_threads() == before + 1
        other.close()
        torch.set_num_threads(before + 2)
        one.close()
        assert torch.get_num_threads() == before + 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of files that nobody closed
def test_one_that_is_forgotten_is_freed_with_its_workers(tmp_path: Path) -> None:
    env = {"id": "Pendulum-v1", "num_envs": 2, "backend": "gymnasium-async", "workers": 1}
    forgotten = Trainer(config_for(env=env, total_steps=64, batch_size=64), root=tmp_path, console=False)
    pids, gone = [worker.process.pid for worker in forgotten.env._workers], weakref.ref(forgotten)
    del forgotten
    gc.collect()
    assert gone() is None and wait_until_gone(pids, GONE_S)


def test_closing_frees_everything_whatever_an_environment_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = trainer(tmp_path)

    def fails() -> None:
        raise RuntimeError("cannot close")

    monkeypatch.setattr(one.env, "close", fails)
    with pytest.raises(RuntimeError, match="cannot close"):
        one.close()
    one.run.lock().release()  # which somebody else can have again


def test_warnings_of_one_run_are_not_in_the_log_of_another(tmp_path: Path) -> None:
    with closing(trainer(tmp_path)) as one, closing(trainer(tmp_path)) as other:
        one.env._on_warning("something odd")
        assert "warning: something odd" in (one.run.path / "log.txt").read_text()
        assert "something odd" not in (other.run.path / "log.txt").read_text()


def test_an_environment_made_by_hand_has_to_be_one_that_evaluations_can_have(tmp_path: Path) -> None:
    config = config_for("Pendulum-v1", env={"id": "MySimulator-v0", "num_envs": 2}, total_steps=64, batch_size=64)
    by_hand = VectorEnvAdapter(gymnasium.make_vec("Pendulum-v1", num_envs=2))
    with pytest.raises(EnvError, match="no environment 'MySimulator-v0' is registered"):
        Trainer(config, root=tmp_path, console=False, env=by_hand)
    by_hand = VectorEnvAdapter(gymnasium.make_vec("Pendulum-v1", num_envs=2))
    other = config.model_copy(update={"env": config.env.model_copy(update={"id": "CartPole-v1"})})
    with pytest.raises(EnvError, match=r"the environment's observations have shape \(4,\), the policy was trained on"):
        Trainer(other, root=tmp_path, console=False, env=by_hand)
    assert not [*tmp_path.iterdir()]


def test_a_gaussian_whose_std_does_not_fit_the_bounds_is_remarked_upon(tmp_path: Path) -> None:
    with closing(trainer(tmp_path, bins=None)) as fits:
        assert "beside the bounds" not in (fits.run.path / "log.txt").read_text()
    with closing(trainer(tmp_path, bins=None, std=0.02)) as small:
        said = (
            "note: the actions' σ of 0.02 is small beside the bounds of component 0, 2 to either side; set policy.std"
        )
        assert said in (small.run.path / "log.txt").read_text()
    with closing(trainer(tmp_path)) as ordinal:
        assert "beside the bounds" not in (ordinal.run.path / "log.txt").read_text()


@pytest.mark.parametrize(
    ("make", "info", "message"),
    [
        (
            lambda env: env,
            (),
            "env is a SyncVectorEnv without device, exact_resume, .*into trpo.envs.vector.VectorEnvAd",
        ),
        (
            lambda env: VectorEnvAdapter(env, info=["a", "b"]),
            ("b", "a"),
            r"env.info is \['b', 'a'\], and .*\['a', 'b'\]",
        ),
        (lambda env: VectorEnvAdapter(env), ("a",), r"env.info is \['a'\], and the environments .* report \[\]"),
    ],
)
def test_an_environment_made_by_hand_that_does_not_fit_is_one_clear_error(
    tmp_path: Path, make: Callable[[Any], Any], info: tuple[str, ...], message: str
) -> None:
    env = {"id": "Pendulum-v1", "num_envs": 2, "info": info}
    config = config_for("Pendulum-v1", env=env, total_steps=64, batch_size=64)
    with pytest.raises(UserError, match=message):
        Trainer(config, root=tmp_path, console=False, env=make(gymnasium.make_vec("Pendulum-v1", num_envs=2)))
    with pytest.raises(UserError, match="env is a list without close, device"):
        Trainer(config, root=tmp_path, console=False, env=[])  # type: ignore[arg-type]


def test_a_batch_that_was_reported_does_not_lie_beside_the_next(tmp_path: Path) -> None:
    alive: list[weakref.ref[Tensor]] = []

    class Looking(Agent):
        def update(self, *args: Any, **kwargs: Any) -> UpdateReport:
            assert all(batch() is None for batch in alive)
            report = super().update(*args, **kwargs)
            alive.append(weakref.ref(report.batch.obs))
            return report

    Trainer(trainer_config(3), root=tmp_path, console=False, make_agent=Looking).train()
    assert len(alive) == 3


def test_a_learner_of_ones_own_learns_from_the_batch_that_is_reported(tmp_path: Path) -> None:
    class Backwards(Agent):
        def estimate(self, samples: Rollout, *, progress: float) -> tuple[Batch, Tensor, Tensor]:
            batch, target, value = super().estimate(samples, progress=progress)
            return replace(batch, advantage=-batch.advantage), target, value

    batches: dict[type[Agent], list[Batch]] = {Agent: [], Backwards: []}
    thetas = {}
    for kind, seen in batches.items():
        trainer = Trainer(
            trainer_config(1),
            root=tmp_path,
            console=False,
            make_agent=kind,
            on_update=lambda trainer, report, seen=seen: seen.append(report.batch),
        )
        start = trainer.agent.policy.theta.vector.clone()
        trainer.train()
        thetas[kind] = trainer.agent.policy.theta.vector - start
    (ours,), (theirs,) = batches.values()
    assert torch.equal(ours.obs, theirs.obs) and torch.equal(ours.advantage, -theirs.advantage)
    # The first step has no memory: it goes the opposite way, but for rounding and where a line search ends.
    cosine = torch.nn.functional.cosine_similarity(*thetas.values(), dim=0)
    assert float(cosine) == pytest.approx(-1, abs=1e-4)


def test_numbers_of_ones_own_are_in_tensorboard_and_in_a_table(tmp_path: Path) -> None:
    def record(trainer: Trainer, report: UpdateReport) -> None:
        trainer.record({"mine/kl_squared": report.step.kl**2})

    trainer = Trainer(trainer_config(2), root=tmp_path, console=False, on_update=record)
    run = trainer.train().directory
    events = EventAccumulator(str(run))
    events.Reload()
    squares = {event.step: event.value for event in events.Scalars("mine/kl_squared")}
    kls = {event.step: event.value for event in events.Scalars("trust_region/kl")}
    assert squares.keys() == kls.keys() == {64, 128}
    assert [*squares.values()] == pytest.approx([kl**2 for kl in kls.values()], rel=1e-6)  # stored as float32
    curve = read_curve(run, "mine/kl_squared")
    assert curve.env_steps.tolist() == [64, 128]
    assert curve.values.tolist() == [kl**2 for kl in read_curve(run, "trust_region/kl").values.tolist()]
    with pytest.raises(RuntimeError, match="closed: record from on_update"):
        trainer.record({"mine/late": 1.0})


@pytest.mark.parametrize("again", [True, False])
def test_recorded_numbers_beyond_the_checkpoint_are_dropped_by_who_goes_on(tmp_path: Path, again: bool) -> None:
    def record(trainer: Trainer, report: UpdateReport) -> None:
        trainer.record({"mine/updates": trainer.updates})

    run = Trainer(trainer_config(4), root=tmp_path, console=False, on_update=record).train(max_updates=2).directory
    with (run / RECORDED_FILE).open("a") as table:
        table.write("192,3\n")  # of an update that no checkpoint knows
    Trainer(trainer_config(4), resume=run, console=False, on_update=record if again else None).train()
    assert read_curve(run, "mine/updates").values.tolist() == ([1, 2, 3, 4] if again else [1, 2])


@pytest.mark.parametrize("only_at_the_end", [False, True])
def test_a_slow_run_is_saved_every_ten_minutes(
    only_at_the_end: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0

    def ten_minutes_later(trainer: Trainer, report: UpdateReport) -> None:
        nonlocal now
        now += 400.0

    monkeypatch.setattr("trpo.run.autosave.time.monotonic", lambda: now)
    settings = CheckpointConfig(every_steps=0) if only_at_the_end else CheckpointConfig()
    config = trainer_config(6).model_copy(update={"checkpoint": settings})
    run = Trainer(config, root=tmp_path, console=False, on_update=ten_minutes_later).train().directory
    # After the updates that find more than 600 s gone since the last time: the second, the fourth; and at the end.
    between = [] if only_at_the_end else ["step-000000256", "step-000000128"]
    assert [path.name for path in checkpoint_paths(run / "checkpoints")] == ["step-000000384", *between]


def test_what_shapes_rewards_may_be_for_training_only(tmp_path: Path) -> None:
    wrapper = {"name": "test_trainer:Shaped", "training_only": True}
    env = {"id": "Pendulum-v1", "num_envs": 2, "stagger": False, "wrappers": [wrapper]}
    config = config_for(env=env, total_steps=800, batch_size=400, evaluation={"every_steps": 400}, device="cpu")
    returns: list[float] = []

    def see(trainer: Trainer, report: UpdateReport) -> None:
        returns.extend(trainer.recent.returns)

    run = Trainer(config, root=tmp_path, console=False, on_update=see).train()
    assert set(returns) == {200.0}  # 1 a step
    assert run.evaluation is not None and run.evaluation.mean < 0  # the task's own
    saved = load_policy(run.directory)
    again = evaluate(saved.policy, config.env, saved.action_space, episodes=20, seed=stream_seed(0, "evaluation"))
    plain = evaluate(saved.policy, EnvConfig(id="Pendulum-v1"), saved.action_space, episodes=20,
                     seed=stream_seed(0, "evaluation"))  # fmt: skip
    assert run.evaluation.returns == again.returns == plain.returns


def test_a_wrapper_for_training_only_that_changes_spaces_is_said_before_anything_is_trained(tmp_path: Path) -> None:
    wrapper = {"name": "test_trainer:Widened", "training_only": True}
    config = config_for(env={"id": "Pendulum-v1", "num_envs": 2, "wrappers": [wrapper]}, total_steps=64, batch_size=64)
    problem = r"observations have shape \(3,\), .*wrappers that are training_only must leave both spaces as they are"
    with pytest.raises(EnvError, match=problem):
        Trainer(config, root=tmp_path, console=False)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("backend", ["gymnasium", "gymnasium-async"])
def test_a_run_stopped_before_its_end_has_a_policy_that_takes_what_its_environment_gives(
    backend: str, tmp_path: Path
) -> None:
    """Of its newest checkpoint; Blackjack observes a tuple of three numbers."""
    env = {"id": "Blackjack-v1", "num_envs": 2, "backend": backend, "workers": 1}
    config = config_for(env=env, total_steps=256, batch_size=64, device="cpu", evaluation={"every_steps": 0})
    source = Trainer(config, root=tmp_path, console=False, on_update=lambda trainer, _: trainer.updates == 2)
    run = source.train().directory
    loaded = load_policy(run)
    assert loaded.path == run / "checkpoints" / "step-000000128" and loaded.info == {"env_steps": 128, "seed": 0}
    assert torch.equal(loaded.policy.theta.vector, source.agent.policy.theta.vector)
    space = gymnasium.make("Blackjack-v1").observation_space
    assert loaded.observation_space == space and loaded.action_space == gymnasium.spaces.Discrete(2)
    hand = (14, 10, 0)
    assert loaded.act(hand) == loaded.act(gymnasium.spaces.flatten(space, hand))
    older = load_policy(run / "checkpoints" / "step-000000128")
    assert torch.equal(older.policy.theta.vector, loaded.policy.theta.vector)


def test_the_latest_evaluation_is_there_to_look_at(tmp_path: Path) -> None:
    seen: list[float | None] = []

    def look(trainer: Trainer, _: UpdateReport) -> bool:
        seen.append(trainer.evaluation and trainer.evaluation.mean)
        return len(seen) == 3

    config = trainer_config(4).model_copy(update={"evaluation": EvaluationConfig(every_steps=128, episodes=2)})
    run = Trainer(config, root=tmp_path, console=False, on_update=look).train().directory
    recorded = float((run / "evaluations.csv").read_text().splitlines()[1].split(",")[1])
    assert seen == [None, pytest.approx(recorded), pytest.approx(recorded)]  # as many digits as the file has


def test_nothing_of_a_run_is_cut_before_all_processes_have_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def another_is_gone(messages: Messages) -> None:
        raise TrainingError("another process of this run has ended")

    run = Trainer(trainer_config(3), root=tmp_path, console=False).train(max_updates=2).directory
    header, *_ = (run / PROGRESS_FILE).read_text().splitlines()
    with (run / PROGRESS_FILE).open("a") as table:
        table.write(f"192{',' * header.count(',')}\n")  # of an update that no checkpoint knows
    before = {file: file.read_bytes() for file in run.iterdir() if file.is_file()}
    monkeypatch.setattr(Messages, "gather", another_is_gone)
    with pytest.raises(TrainingError, match="another process"):
        Trainer(trainer_config(3), resume=run, console=False)
    assert {file: file.read_bytes() for file in run.iterdir() if file.is_file()} == before


def test_a_prolonged_run_still_knows_what_its_last_evaluation_returned(tmp_path: Path) -> None:
    """`best/` must not go to the first policy that is evaluated afterwards, if that returns less."""
    first = Trainer(trainer_config(2), root=tmp_path, console=False)
    run = first.train().directory
    assert first.best_return == load_policy(run / "best").info["evaluation"]["eval/mean_reward"]
    prolonged = load_config(run / "config.yaml", ["total_steps=384"])
    with closing(Trainer(prolonged, resume=run, console=False)) as second:
        assert second.best_return == first.best_return and second.evaluation == first.evaluation
        assert "of another task" not in (run / "log.txt").read_text()


def test_a_final_policy_is_the_last_of_as_many_steps_as_it_has_seen_alone(tmp_path: Path) -> None:
    config = config_for("CartPole-v1", total_steps=64, batch_size=64, device="cpu", evaluation={"final_episodes": 1})
    source = Trainer(config, root=tmp_path, console=False)
    source.train()
    assert [source.evaluations.has_last(env_steps) for env_steps in (63, 64, 65)] == [False, True, False]


def test_there_is_no_iteration_after_the_end_nor_after_close(tmp_path: Path) -> None:
    source = trainer(tmp_path, updates=1)
    source.iteration()
    with pytest.raises(RuntimeError, match="the run is at its end"):
        source.iteration()
    source.close()
    with pytest.raises(RuntimeError, match="this trainer is closed"):
        source.iteration()
