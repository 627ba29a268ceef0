"""Faults injected into whole training runs: what is saved stays good, and what goes on is what would have been.

`docs/reliability.md` lists every fault with its promise and the test that injects it; the rows whose tests are in other
files are not repeated here.
"""

from __future__ import annotations

import ast
import hashlib
import math
import os
import re
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from commands import PROJECT, command, one_line, run_script
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete
from helpers import make_mlp, seeded
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_env_workers import GONE_S, gone, wait_until_gone
from test_metrics import file_size_limit
from test_resume import assert_same_run, config, differences, last_state, resume, table, train

import trpo.agent
import trpo.trainer
from trpo.config import AdamFitConfig, Config
from trpo.config.file import dump_config, load_config
from trpo.distributions import Ordinal
from trpo.envs.vector import VectorEnvAdapter
from trpo.errors import CheckpointError, EnvError, TrainingError, UserError
from trpo.natural_gradient import LineSearchResult, Outcome, Rejection, StepReport
from trpo.run import directory as run_directory
from trpo.run import evaluations
from trpo.run.checkpoint import checkpoint_paths, load_state
from trpo.run.directory import RunDirectory
from trpo.run.metrics import EVALUATIONS_FILE, PROGRESS_FILE
from trpo.run.saved_policy import load_policy
from trpo.runtime.random_streams import stream_seed
from trpo.trainer import Trainer
from trpo.value import AdamFit, ValueFunction

Patch = pytest.MonkeyPatch
Capture = pytest.CaptureFixture[str]

LARGE = {"hidden_sizes": (128, 128)}  # a checkpoint of more than 64 kB, and tables of less
SMALL_DISK = 48_000  # bytes a file may have: the tables fit, the checkpoint does not


class Plain(gymnasium.Env[Any, Any]):
    """Any spaces, a constant observation unless it is sampled, a constant reward, episodes of a given length."""

    def __init__(
        self, reward: float = 1.0, length: int | None = None, observation: Any = None, action: Any = None
    ) -> None:
        self.observation_space = observation or Box(-np.inf, np.inf, (3,), np.float64)
        self.action_space = action or Box(-1, 1, (2,), np.float32)
        self.reward, self.length, self.sampled = reward, length, observation is not None
        self.received: list[Any] = []

    def observe(self) -> Any:
        return self.observation_space.sample() if self.sampled else np.full(3, 0.5)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.steps = 0
        return self.observe(), {}

    def step(self, action: Any) -> Any:
        self.steps += 1
        self.received.append(action)
        return self.observe(), self.reward, self.steps == self.length, False, {}


gymnasium.register("Plain-v0", entry_point=Plain)


def plain_config(env: dict[str, Any] | None = None, **changes: Any) -> Config:
    """Three updates in `Plain` environments, without evaluations unless asked for."""
    settings = {"total_steps": 288, "evaluation": {"every_steps": 0}, **changes}
    return config("Plain-v0", **{"env": {"id": "Plain-v0", "num_envs": 3, "kwargs": env or {}}, **settings})


def worker_config(env_id: str = "Pendulum-v1", *, workers: int = 1, **changes: Any) -> Config:
    """As `config`, in worker processes; `changes` are settings of the environment."""
    env = {"id": env_id, "num_envs": 3, "backend": "gymnasium-async", "workers": workers, **changes}
    return config(env_id, env=env)


def updates_of(trainer: Trainer, count: int) -> None:
    """Trains some updates without ending the run."""
    for _ in range(count):
        trainer._save_if_due(trainer.iteration())


@pytest.fixture
def trainer_of() -> Iterator[Callable[..., Trainer]]:
    """Makes trainers and closes them."""
    made: list[Trainer] = []

    def make(settings: Config, root: Path, *, console: bool = False, **options: Any) -> Trainer:
        made.append(Trainer(settings, root=root, console=console, **options))
        return made[-1]

    yield make
    for trainer in made:
        trainer.close()


def tensors_of(tree: Any) -> Iterator[torch.Tensor]:
    """All arrays and floats of a state, as tensors."""
    if isinstance(tree, dict | list | tuple):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from tensors_of(value)
    elif isinstance(tree, torch.Tensor | np.ndarray | float):
        yield torch.as_tensor(tree)


def assert_finite(state: dict[str, Any]) -> None:
    """No NaN and no infinity anywhere in a checkpoint: networks, optimiser, statistics, environments, counters."""
    # −∞ before the first evaluation; spaces may have no bounds.
    learned = {**state, "counters": {**state["counters"], "best_return": 0.0}, "observation_space": {}}
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors_of(learned))


def steps_in_tensorboard(run: Path, tag: str) -> list[int]:
    events = EventAccumulator(str(run))
    events.Reload()
    return [event.step for event in events.Scalars(tag)]


# --- 2, 21, 22: which run and which checkpoint ---


def test_auto_takes_the_newest_valid_checkpoint_of_the_newest_run_that_has_one(
    tmp_path: Path, capsys: Capture, monkeypatch: Patch
) -> None:
    settings = config()
    undisturbed = train(settings, tmp_path / "a").directory
    root = tmp_path / "b"
    older = train(settings, root, max_updates=1).directory
    newer = train(settings, root, max_updates=3).directory
    empty = RunDirectory.create(root, settings).path  # killed before its first checkpoint
    newest = checkpoint_paths(newer / "checkpoints")[0]
    (newest / "tensors.safetensors").write_bytes((newest / "tensors.safetensors").read_bytes()[:-1])
    arguments = ("--config", undisturbed / "config.yaml", "--root", root, "--resume", "auto")
    outcome = run_script("train.py", *arguments, capture=capsys, patch=monkeypatch)
    assert outcome.status == 0 and outcome.err == ""
    said = f"warning: skipped a damaged checkpoint: cannot load {newest}"
    assert said in outcome.out and said in (newer / "log.txt").read_text()
    assert_same_run(undisturbed, newer)
    assert len(checkpoint_paths(older / "checkpoints")) == 1 and not (older / "final").exists()
    assert not any(empty.glob("checkpoints/*"))


def test_auto_starts_a_new_run_where_none_has_a_checkpoint(tmp_path: Path, capsys: Capture, monkeypatch: Patch) -> None:
    settings = config()
    empty = RunDirectory.create(tmp_path, settings).path
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(settings), encoding="utf-8")
    arguments = ("--config", file, "--root", tmp_path)
    outcome = run_script("train.py", *arguments, "--resume", "auto", capture=capsys, patch=monkeypatch)
    assert outcome.status == 0
    (made,) = set(empty.parent.iterdir()) - {empty}
    assert (made / "final").is_dir() and not any(empty.glob("checkpoints/*"))
    outcome = run_script("train.py", "--resume", empty, capture=capsys, patch=monkeypatch)
    assert outcome.status == 2 and "no valid checkpoint to resume from; start a new run" in one_line(outcome.err)


def test_a_checkpoint_named_in_place_of_its_run_is_one_clear_line(
    tmp_path: Path, capsys: Capture, monkeypatch: Patch
) -> None:
    checkpoint = checkpoint_paths(train(config(), tmp_path, max_updates=1).directory / "checkpoints")[0]
    outcome = run_script("train.py", "--resume", checkpoint, capture=capsys, patch=monkeypatch)
    assert outcome.status == 2 and str(checkpoint) in one_line(outcome.err)


def test_a_second_trainer_is_refused_and_the_first_does_not_notice(
    tmp_path: Path, capsys: Capture, monkeypatch: Patch, trainer_of: Callable[..., Trainer]
) -> None:
    settings = config()
    undisturbed = train(settings, tmp_path / "a").directory
    run = train(settings, tmp_path / "b", max_updates=1).directory
    first = trainer_of(settings, tmp_path, resume=run)
    updates_of(first, 1)
    for choice in ((run,), ("auto", "--config", run / "config.yaml", "--root", tmp_path / "b")):
        outcome = run_script("train.py", "--resume", *choice, capture=capsys, patch=monkeypatch)
        assert outcome.status == 2 and f"in use by process {os.getpid()}; stop it" in one_line(outcome.err)
    first.train()
    assert_same_run(undisturbed, run)


def test_changed_settings_are_refused_unless_asked_for_and_then_shown(
    tmp_path: Path, capsys: Capture, monkeypatch: Patch
) -> None:
    run = train(config(), tmp_path, max_updates=1).directory
    before = sorted(path.name for path in run.rglob("*"))
    changed = tmp_path / "changed.yaml"
    changed.write_text(dump_config(config(natural_gradient={"max_kl": 0.02})), encoding="utf-8")
    outcome = run_script("train.py", "--resume", run, "--config", changed, capture=capsys, patch=monkeypatch)
    assert outcome.status == 2
    assert re.search(r"differs from the settings of .* \(natural_gradient.max_kl: .*→ 0.02", one_line(outcome.err))
    assert sorted(path.name for path in run.rglob("*")) == before
    asked = ("--set", "natural_gradient.damping=0.2", "--set", "total_steps=192")
    outcome = run_script("train.py", "--resume", run, *asked, capture=capsys, patch=monkeypatch)
    assert outcome.status == 0
    shown = "goes on from 96 steps with other settings: total_steps: 384 → 192; natural_gradient.damping: 1.0 → 0.2"
    assert shown in outcome.out
    recorded = load_config(run / "config.yaml")  # the next resume goes on with them
    assert (recorded.total_steps, recorded.natural_gradient.damping) == (192, 0.2)


@pytest.mark.parametrize(
    ("env", "problem"),
    [
        ({"id": "Acrobot-v1"}, "does not fit this config"),
        ({"num_envs": 6}, "the state holds 3 environments, this run has 6"),
    ],
)
def test_another_environment_is_refused(env: dict[str, Any], problem: str, tmp_path: Path) -> None:
    run = train(config(), tmp_path, max_updates=1).directory
    other = config(env={"id": "CartPole-v1", "num_envs": 3, **env}, policy={"hidden_sizes": (8, 8)})
    with pytest.raises(UserError, match=problem):
        Trainer(other, resume=run, console=False)
    assert_same_run(train(config(), tmp_path / "a").directory, resume(run).directory)


def test_the_name_is_the_directorys_for_good(tmp_path: Path) -> None:
    run = train(config(), tmp_path, max_updates=1).directory
    with pytest.raises(UserError, match="name cannot change within a run"):
        Trainer(config(name="other"), resume=run, console=False)


def test_what_cannot_be_replayed_goes_on_with_new_episodes_and_says_so(tmp_path: Path) -> None:
    wrapped = {"id": "CartPole-v1", "num_envs": 3, "wrappers": [{"name": "gymnasium.wrappers:NormalizeObservation"}]}
    run = train(config(env=wrapped), tmp_path, max_updates=1).directory
    trainer = Trainer(config(env=wrapped), resume=run, console=False)
    log = (run / "log.txt").read_text()
    assert re.search(r"warning: environment \d did not come back .*; the run goes on with new episodes", log)
    assert trainer.collector._running_length.tolist() == [0, 0, 0] and not trainer.agent.reward_scaler.returns.any()
    assert trainer.train().env_steps == 384


@pytest.mark.parametrize("backend", ["gymnasium", "gymnasium-async"])
def test_an_environment_that_raises_costs_the_running_episodes_and_nothing_else(backend: str, tmp_path: Path) -> None:
    env = {"id": "faulty_envs:RaisesAfter-v0", "num_envs": 3, "backend": backend, "workers": 1}
    marker = tmp_path / "raised"
    settings = config(env={**env, "kwargs": {"steps": 70, "marker": str(marker)}}, checkpoint={"every_steps": 10**6})
    trainer = Trainer(settings, root=tmp_path, console=False)
    first = trainer.collector.obs.clone()
    with pytest.raises(EnvError, match="out of fuel"):
        trainer.train()
    run, learned = trainer.run.path, trainer.agent.policy.theta.vector
    again = Trainer(load_config(run / "config.yaml"), resume=run, console=False)
    assert "the run goes on with new episodes" in (run / "log.txt").read_text()
    assert not torch.equal(again.collector.obs, first)  # nor are they those that the run began with
    assert again.env_steps == 192 and torch.equal(again.agent.policy.theta.vector, learned)
    assert again.collector._running_length.tolist() == [0, 0, 0]
    assert again.train().env_steps == 384


def test_one_that_raises_right_after_a_resume_leaves_the_exact_checkpoint(tmp_path: Path, monkeypatch: Patch) -> None:
    undisturbed = train(config(), tmp_path / "a").directory
    run = train(config(), tmp_path / "b", max_updates=2).directory
    trainer = Trainer(config(), resume=run, console=False)

    def fails(action: Any) -> Any:
        raise EnvError("transient")

    monkeypatch.setattr(trainer.env, "step", fails)
    with pytest.raises(EnvError, match="transient"):
        trainer.train()
    resume(run)
    assert_same_run(undisturbed, run)


# --- 3, 4: the disk is full ---


def test_a_full_disk_costs_checkpoints_and_nothing_else(tmp_path: Path, capsys: Capture) -> None:
    settings = config(policy=LARGE, evaluation={"every_steps": 0, "final_episodes": 1})
    undisturbed = train(settings, tmp_path / "a").directory
    run = train(settings, tmp_path / "b", max_updates=1).directory
    (old,) = checkpoint_paths(run / "checkpoints")
    saved = load_state(old)
    trainer = Trainer(settings, resume=run)
    capsys.readouterr()
    with file_size_limit(SMALL_DISK):
        updates_of(trainer, 2)  # a checkpoint is due after each
    out = capsys.readouterr().out
    assert out.count("warning: no checkpoint at") == 2 and "File too large" in out
    assert "failure 2 in a row, given up at 5" in out
    assert [*(run / "checkpoints").iterdir()] == [old]
    assert differences(load_state(old), saved) == []
    trainer.train()
    assert trainer.autosave.failures_in_a_row == 0
    assert_same_run(undisturbed, run)


def test_too_many_failed_saves_in_a_row_end_the_run_and_its_last_checkpoint_goes_on(tmp_path: Path) -> None:
    settings = config(policy=LARGE, checkpoint={"every_steps": 96, "abort_after": 2})
    undisturbed = train(settings, tmp_path / "a").directory
    run = train(settings, tmp_path / "b", max_updates=1).directory

    def small_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL_DISK, SMALL_DISK))

    done = subprocess.run(
        command("train.py", "--resume", run), preexec_fn=small_disk, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "2 checkpoints in a row failed" in one_line(done.stderr) and "free space" in done.stderr
    assert last_state(run)["counters"]["updates"] == 1
    resume(run)
    assert_same_run(undisturbed, run)


def test_best_is_the_best_that_could_be_saved(
    tmp_path: Path, monkeypatch: Patch, trainer_of: Callable[..., Trainer]
) -> None:
    """A better policy lost to a full disk must not keep the next one, worse but the best on disk, from being saved."""
    trainer = trainer_of(config(policy=LARGE, evaluation={"every_steps": 0}), tmp_path)
    returns = iter((5.0, 9.0, 7.0))
    evaluate = evaluations.evaluate

    def scripted(*args: Any, **options: Any) -> Any:
        result = evaluate(*args, **options)
        return type(result)((next(returns),), result.lengths[:1], result.successes[:0])

    monkeypatch.setattr(evaluations, "evaluate", scripted)
    trainer._evaluate(1)
    with file_size_limit(SMALL_DISK):
        trainer._evaluate(1)
    assert "the best policy so far was not saved: " in (trainer.run.path / "log.txt").read_text()
    assert load_policy(trainer.run.best).info["evaluation"]["eval/mean_reward"] == 5.0
    trainer._evaluate(1)
    assert load_policy(trainer.run.best).info["evaluation"]["eval/mean_reward"] == 7.0


@pytest.mark.parametrize("sink", [PROGRESS_FILE, "TensorBoard events"])
def test_a_full_disk_in_the_metrics_costs_that_file_and_no_checkpoint(
    sink: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    undisturbed = train(config(), tmp_path / "a").directory
    trainer = Trainer(config(), root=tmp_path / "b", console=False)
    updates_of(trainer, 1)
    file = trainer.writer._sinks[sink]
    descriptor = file._file._file.fileno()
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, descriptor)  # every write from now on: no space left on device
    os.close(full)
    run = trainer.train().directory
    states = [last_state(path) for path in (undisturbed, run)]
    for state in states:
        del state["counters"]["elapsed_s"]
    assert differences(*states) == []
    written = {
        PROGRESS_FILE: [row["env_steps"] for row in table(run, PROGRESS_FILE)],
        "TensorBoard events": [str(step) for step in steps_in_tensorboard(run, "trust_region/entropy")],
    }
    assert written.pop(sink) == ["96"]
    assert [*written.values()] == [["96", "192", "288", "384"]]
    assert table(run, EVALUATIONS_FILE) == table(undisturbed, EVALUATIONS_FILE)
    assert f"warning: {sink} can no longer be written (No space left on device)" in caplog.text


# --- 5: stopped and resumed, in worker processes and with many joints ---


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1", "Hopper-v5", "Ant-v5"])
def test_worker_processes_go_on_as_if_undisturbed(env_id: str, tmp_path: Path) -> None:
    settings = worker_config(env_id, workers=2 if env_id == "CartPole-v1" else 1)
    undisturbed = train(settings, tmp_path / "a").directory
    run = train(settings, tmp_path / "b", max_updates=1).directory
    resume(run)
    assert_same_run(undisturbed, run)


def test_ant_goes_on_as_if_undisturbed(tmp_path: Path) -> None:
    undisturbed = train(config("Ant-v5"), tmp_path / "a").directory
    run = train(config("Ant-v5"), tmp_path / "b", max_updates=3).directory
    resume(run)
    assert_same_run(undisturbed, run)


# --- 7, 8: signals ---

PHASES: dict[str, tuple[Any, str]] = {
    "rollout": (trpo.collector.Collector, "_episodes"),
    "advantages": (trpo.agent, "gae"),
    "fisher product": (Ordinal, "metric"),
    "line search": (Ordinal, "kl"),
    "evaluation": (evaluations, "evaluate"),
    "saving": (trpo.run.checkpoint, "sync_directory"),
}


@pytest.mark.parametrize(
    ("phase", "stop"), [*zip(PHASES, 2 * (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1), strict=True)]
)
def test_a_signal_in_any_phase_ends_the_update_saves_and_loses_nothing(
    phase: str, stop: signal.Signals, tmp_path: Path, pendulum: Path, monkeypatch: Patch
) -> None:
    owner, name = PHASES[phase]
    original = getattr(owner, name)
    calls = 0

    def interrupted(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1:
            os.kill(os.getpid(), stop)
        return original(*args, **options)

    trainer = Trainer(config("Pendulum-v1"), root=tmp_path, console=False)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        result = trainer.train()
    # Evaluations come at 192 steps, checkpoints at 96.
    assert result.env_steps == (192 if phase == "evaluation" else 96)
    assert (result.stopped_by, result.exit_status) == (stop, 128 + stop)
    run = result.directory
    assert last_state(run)["counters"]["env_steps"] == result.env_steps
    assert f"stopped by {stop.name} at {result.env_steps} steps" in (run / "log.txt").read_text()
    resume(run)
    assert_same_run(pendulum, run)
    assert steps_in_tensorboard(run, "trust_region/entropy") == [96, 192, 288, 384]  # no gap, no overlap
    assert steps_in_tensorboard(run, "eval/mean_reward") == [192, 384]


@pytest.fixture(scope="module")
def pendulum(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed run of `config("Pendulum-v1")`."""
    return train(config("Pendulum-v1"), tmp_path_factory.mktemp("undisturbed")).directory


def test_a_signal_in_the_last_evaluation_lets_the_run_end_well(
    tmp_path: Path, pendulum: Path, monkeypatch: Patch
) -> None:
    trainer = Trainer(config("Pendulum-v1"), root=tmp_path, console=False)
    evaluate = evaluations.evaluate

    def interrupted(*args: Any, **options: Any) -> Any:
        if trainer.updates == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*args, **options)

    monkeypatch.setattr(evaluations, "evaluate", interrupted)
    result = trainer.train()
    assert result.exit_status == 0 and result.evaluation is not None  # complete: nothing to go on with
    assert_same_run(pendulum, result.directory)


def killed_while_saving_final(trainer: Trainer, patch: Patch) -> None:
    """A run that ends, as by SIGKILL, after its last evaluation was logged and before `final/` was saved."""

    class Killed(BaseException):
        pass

    def die(*args: Any, **options: Any) -> None:
        raise Killed

    patch.setattr(trainer.evaluations, "keep_last", die)
    with pytest.raises(Killed):
        trainer.train()


def test_a_last_evaluation_cut_short_is_made_again_and_logged_once(
    tmp_path: Path, pendulum: Path, monkeypatch: Patch
) -> None:
    trainer = Trainer(config("Pendulum-v1"), root=tmp_path, console=False)
    killed_while_saving_final(trainer, monkeypatch)
    run = trainer.run.path
    assert [row["env_steps"] for row in table(run, EVALUATIONS_FILE)] == ["192", "384"]
    resume(run)
    assert_same_run(pendulum, run)


def test_a_prolonged_run_is_not_taken_for_finished_because_the_shorter_one_was(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    run = train(config(), tmp_path).directory
    longer = config(total_steps=96 * 6)
    killed_while_saving_final(Trainer(longer, resume=run, console=False), monkeypatch)
    assert not (run / "final").exists()
    assert Trainer(longer, resume=run, console=False).train().evaluation is not None
    assert load_policy(run / "final").info["env_steps"] == 96 * 6
    assert [row["env_steps"] for row in table(run, EVALUATIONS_FILE)] == ["192", "384", "576"]


def test_a_run_is_not_cut_shorter_than_it_is(tmp_path: Path, capsys: Capture, monkeypatch: Patch) -> None:
    run = train(config(), tmp_path, max_updates=3).directory
    before = (run / "config.yaml").read_bytes()
    outcome = run_script("train.py", "--resume", run, "--set", "total_steps=192", capture=capsys, patch=monkeypatch)
    assert outcome.status == 2 and "total_steps 192: the run has taken 288 already" in one_line(outcome.err)
    assert (run / "config.yaml").read_bytes() == before
    assert resume(run).evaluation is not None


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_run_stopped_in_every_way_with_its_workers_is_the_undisturbed_one(
    tmp_path: Path, capsys: Capture, monkeypatch: Patch
) -> None:
    """SIGTERM to the process group (a launcher), SIGINT to the group (a terminal), SIGKILL to the process."""
    quiet: dict[str, Any] = {"evaluation": {"every_steps": 0, "final_episodes": 1}, "checkpoint": {"every_steps": 192}}
    settings = worker_config().model_copy(update={"total_steps": 96 * 60})
    settings = Config.model_validate({**settings.model_dump(by_alias=True), **quiet})
    undisturbed = train(settings, tmp_path / "a").directory
    (tmp_path / "config.yaml").write_text(dump_config(settings), encoding="utf-8")
    arguments = ("--config", tmp_path / "config.yaml", "--root", tmp_path / "b", "--resume", "auto")
    for stop, send, status in (
        (signal.SIGTERM, os.killpg, 143),
        (signal.SIGINT, os.killpg, 130),
        (signal.SIGKILL, os.kill, -signal.SIGKILL),
    ):
        with subprocess.Popen(
            command("train.py", *arguments), stdout=subprocess.PIPE, text=True, start_new_session=True
        ) as process:
            assert process.stdout is not None
            lines = iter(process.stdout.readline, "")
            assert any("steps/s" in line for line in lines)  # its first update is done
            if stop == signal.SIGKILL:
                wait_for_a_new_checkpoint(tmp_path / "b")
            workers = children(process.pid)
            assert len(workers) == 1 and not gone(workers[0])
            send(process.pid, stop)
            assert process.wait(30) == status
        assert wait_until_gone(workers, GONE_S if stop == signal.SIGKILL else 0.0)
    outcome = run_script("train.py", *arguments, capture=capsys, patch=monkeypatch)
    assert outcome.status == 0
    (run,) = (tmp_path / "b" / "Pendulum-v1").iterdir()
    assert_same_run(undisturbed, run)
    steps = [96 * update for update in range(1, 61)]
    assert steps_in_tensorboard(run, "trust_region/entropy") == steps
    assert [int(row["env_steps"]) for row in table(run, PROGRESS_FILE)] == steps


def wait_for_a_new_checkpoint(root: Path) -> None:
    def newest() -> list[Path]:
        return sorted(root.glob("*/*/checkpoints/step-*"))[-1:]

    before = newest()
    while newest() == before:
        time.sleep(0.001)


def test_the_second_interrupt_ends_the_process_at_once(tmp_path: Path) -> None:
    (tmp_path / "slow_env.py").write_text(
        "import os, signal, gymnasium\n"
        "from gymnasium.envs.classic_control import CartPoleEnv\n"
        "class Slow(CartPoleEnv):\n"
        "    def step(self, action):\n"
        "        arrived, wakeup = os.pipe()\n"  # a signal leaves a byte, also one that comes before the read
        "        os.set_blocking(wakeup, False)\n"
        "        signal.set_wakeup_fd(wakeup)\n"
        "        while True:\n"
        "            print('waiting', flush=True)\n"
        "            os.read(arrived, 1)\n"
        "gymnasium.register('Slow-v0', entry_point=Slow)\n",
        encoding="utf-8",
    )
    (tmp_path / "config.yaml").write_text("env: {id: 'slow_env:Slow-v0'}\n", encoding="utf-8")
    arguments = ("--config", tmp_path / "config.yaml", "--root", tmp_path / "runs")
    with subprocess.Popen(
        command("train.py", *arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(PROJECT), str(tmp_path)])},
    ) as process:
        assert process.stdout is not None
        assert "slow_env:Slow-v0 on cpu, in " in process.stdout.readline()
        assert process.stdout.readline() == "waiting\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "waiting\n"  # taken note of: the update under way goes on
        process.send_signal(signal.SIGINT)
        assert process.wait(10) in (-signal.SIGINT, 128 + signal.SIGINT)  # a shell shows both as 130


# --- 9 to 12: environments that fail under training ---


def kill_worker_once(trainer: Trainer, patch: Patch, at_step: int, position: int = 0) -> None:
    """SIGKILL to a worker process before the environments' step number `at_step`."""
    step, taken = trainer.env.step, 0

    def kill_then_step(action: torch.Tensor) -> Any:
        nonlocal taken
        taken += 1
        if taken == at_step:
            trainer.env._workers[position].process.kill()
        return step(action)

    patch.setattr(trainer.env, "step", kill_then_step)


def test_a_worker_killed_ends_the_run_and_resuming_loses_nothing(tmp_path: Path, monkeypatch: Patch) -> None:
    settings = worker_config(workers=2)
    undisturbed = train(settings, tmp_path / "a").directory
    trainer = Trainer(settings, root=tmp_path / "b", console=False)
    kill_worker_once(trainer, monkeypatch, at_step=75)  # amid the third rollout of 32 steps
    with pytest.raises(EnvError, match="worker process of environments 0 to 1 was killed by SIGKILL"):
        trainer.train()
    run = trainer.run.path
    assert last_state(run)["counters"]["updates"] == 2
    resume(run)
    assert_same_run(undisturbed, run)


def test_with_restart_a_killed_worker_costs_the_steps_in_flight(tmp_path: Path, monkeypatch: Patch) -> None:
    settings = worker_config(workers=2, on_worker_failure="restart", max_restarts=2)
    trainer = Trainer(settings, root=tmp_path, console=False)
    kill_worker_once(trainer, monkeypatch, at_step=40)  # amid the second rollout
    scale, rollouts = trainer.agent.scale, []

    def observe(rollout: Any) -> Any:
        rollouts.append((rollout.valid.clone(), rollout.truncated.clone(), rollout.terminated.clone()))
        return scale(rollout)

    monkeypatch.setattr(trainer.agent, "scale", observe)
    result = trainer.train()
    valid, truncated, terminated = rollouts[1]
    assert (~valid).nonzero().tolist() == [[7, 0], [7, 1]]  # environments 0 and 1 at the 40th step
    assert truncated[7, :2].all() and not terminated[7].any()
    assert all(bool(others.all()) for others, *_ in rollouts[:1] + rollouts[2:])
    state = last_state(result.directory)
    assert result.env_steps == state["counters"]["env_steps"] == 4 * 96 - 2
    assert state["processes"][0]["collector"]["env"]["restarts"] == 1
    assert_finite(state)
    assert max(state["recent"]["lengths"], default=0) <= 200  # Pendulum's limit: no episode counts across the cut


def test_with_restart_a_worker_killed_before_a_checkpoint_costs_no_checkpoint(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    """Killed during the update: found out by saving. The checkpoint holds the new episodes, and that the old were cut.

    What goes on from it is, to the bit, what goes on without stopping.
    """
    settings = worker_config(workers=2, on_worker_failure="restart", max_restarts=1)
    runs = []
    for max_updates in (None, 2):
        trainer = Trainer(settings, root=tmp_path, console=False)
        update = trainer.agent.update

        def kill_then_update(
            *args: Any, trainer: Trainer = trainer, update: Callable[..., Any] = update, **options: Any
        ) -> Any:
            if trainer.updates == 1:
                trainer.env._workers[1].process.kill()
                trainer.env._workers[1].process.wait()
            return update(*args, **options)

        monkeypatch.setattr(trainer.agent, "update", kill_then_update)
        runs.append(trainer.train(max_updates=max_updates).directory)
    at_once, stopped = runs
    assert last_state(stopped)["processes"][0]["collector"]["env"]["interrupted"].tolist() == [False, False, True]
    result = resume(stopped)
    assert result.env_steps == 4 * 96 - 1  # the first row after the cut is no transition
    assert_same_run(at_once, stopped)


def test_restarts_end_with_their_allowance_counted_over_resumes(tmp_path: Path, monkeypatch: Patch) -> None:
    settings = worker_config(on_worker_failure="restart", max_restarts=1)
    trainer = Trainer(settings, root=tmp_path, console=False)
    kill_worker_once(trainer, monkeypatch, at_step=10)
    run = trainer.train(max_updates=1).directory
    trainer = Trainer(settings, resume=run, console=False)
    kill_worker_once(trainer, monkeypatch, at_step=10)
    with pytest.raises(EnvError, match=r"killed by SIGKILL.*env.max_restarts \(1\) is used up"):
        trainer.train()
    assert last_state(run)["counters"]["updates"] == 1


@pytest.mark.parametrize(
    ("fault", "workers", "problem"),
    [
        ("nan_reward", 0, "environment 1, step 40 of its episode, gave a reward that is not finite"),
        ("inf_obs", 0, "environment 1, step 40 of its episode, gave an observation that is not finite"),
        ("reward_shape", 0, "environment 1, step 40 of its episode, returned float64[1] as its reward"),
        ("unpicklable", 2, "environment 1, step 40 of its episode, raised Unpicklable: held by a lock"),
        ("hang", 2, "worker process of environments 0 to 1 gave no answer within 0.5 s"),
    ],
)
def test_a_failing_environment_ends_training_before_anything_has_used_it(
    fault: str, workers: int, problem: str, tmp_path: Path, capsys: Capture, monkeypatch: Patch
) -> None:
    """In the second rollout: nothing of it has reached the statistics, and the checkpoint of the first is whole."""
    broken = {"fault": fault, "seed": stream_seed(0, "environments", 1), "at": 40}
    env = {"id": "faulty_envs:Faulty-v0", "num_envs": 3, "kwargs": broken, "timeout_s": 0.5}
    if workers:
        env |= {"backend": "gymnasium-async", "workers": workers}
    settings = config("faulty_envs:Faulty-v0", env=env, evaluation={"every_steps": 0})
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(settings), encoding="utf-8")
    trainers: list[Trainer] = []
    load = trpo.trainer.Trainer.train
    monkeypatch.setattr(
        trpo.trainer.Trainer, "train", lambda self, **options: (trainers.append(self), load(self, **options))[1]
    )
    outcome = run_script("train.py", "--config", file, "--root", tmp_path / "runs", capture=capsys, patch=monkeypatch)
    assert outcome.status == 2 and problem in one_line(outcome.err)
    (trainer,) = trainers
    log = (trainer.run.path / "log.txt").read_text()
    assert "Traceback" in log and problem in log and ("faulty_envs.py" in log or fault != "unpicklable")
    assert f"go on from the newest checkpoint with --resume {trainer.run.path}" in log
    saved = last_state(trainer.run.path)
    assert saved["counters"]["updates"] == 1
    agent = {**trainer.agent.state_dict(), **trainer.agent.local_state_dict()}
    assert differences(agent, {**saved["agent"], **saved["processes"][0]["agent"]}) == []
    assert_finite(saved)


def test_an_environment_that_cannot_be_built_leaves_no_run(tmp_path: Path, capsys: Capture, monkeypatch: Patch) -> None:
    env = {"id": "faulty_envs:FirstDiffers-v0", "num_envs": 3, "backend": "gymnasium-async", "workers": 2}
    file = tmp_path / "config.yaml"
    built = {"kwargs": {"marker": str(tmp_path / "built")}}
    file.write_text(dump_config(config(env={**env, **built})), encoding="utf-8")
    outcome = run_script("train.py", "--config", file, "--root", tmp_path / "runs", capture=capsys, patch=monkeypatch)
    assert outcome.status == 2 and "RuntimeError: no licence found" in one_line(outcome.err)
    assert not (tmp_path / "runs").exists()


# --- 13 to 15: numbers that break down ---


def becomes(factor: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda result: result * factor


def products_become(factor: float) -> Callable[[Callable[[torch.Tensor], torch.Tensor]], object]:
    return lambda metric: lambda u: metric(u) * factor


EXHAUSTED = "line search exhausted: last candidate had non-finite surrogate or KL"
NUMERICS: dict[str, tuple[str, Callable[[Any], object], str]] = {
    "gradient": ("score", becomes(math.nan), "non-finite gradient"),
    "Fisher product": ("metric", products_become(math.nan), "non-finite Fisher-vector product"),
    "negative curvature": ("metric", products_become(-1e6), "non-positive curvature"),
    "surrogate": ("log_prob", becomes(math.nan), EXHAUSTED),
    "KL": ("kl", becomes(math.inf), EXHAUSTED),
}


@pytest.mark.parametrize("where", NUMERICS)
def test_numbers_that_break_down_cost_their_update_and_are_named(
    where: str, tmp_path: Path, monkeypatch: Patch, trainer_of: Callable[..., Trainer]
) -> None:
    method, spoil, reason = NUMERICS[where]
    trainer = trainer_of(config("Pendulum-v1", total_steps=480, evaluation={"every_steps": 0}), tmp_path)
    theta = trainer.agent.policy.theta.vector
    original = getattr(Ordinal, method)
    updates_of(trainer, 1)
    moved, value = theta.clone(), trainer.agent.value.theta.vector.clone()
    with monkeypatch.context() as patch:
        patch.setattr(Ordinal, method, lambda *args: spoil(original(*args)))
        updates_of(trainer, 2)
    assert theta.numpy().tobytes() == moved.numpy().tobytes()
    assert not torch.equal(trainer.agent.value.theta.vector, value)  # V goes on learning
    assert (trainer.skipped_updates, trainer.nonfinite_in_a_row) == (2, 2)
    updates_of(trainer, 1)
    assert not torch.equal(theta, moved)
    assert (trainer.skipped_updates, trainer.nonfinite_in_a_row) == (2, 0)
    assert_finite(last_state(trainer.run.path))
    rows = table(trainer.run.path, PROGRESS_FILE)
    assert [float(row["trust_region/skipped_updates"]) for row in rows] == [0, 1, 2, 2]
    log = (trainer.run.path / "log.txt").read_text()
    assert f"update 2 left the policy unchanged: {reason}" in log and "update 3 left the policy unchanged" in log


@pytest.mark.parametrize("where", NUMERICS)
def test_too_many_broken_updates_in_a_row_end_the_run(where: str, tmp_path: Path, monkeypatch: Patch) -> None:
    method, spoil, reason = NUMERICS[where]
    quiet: dict[str, Any] = {"evaluation": {"every_steps": 0}, "checkpoint": {"every_steps": 0}}
    settings = config("Pendulum-v1", natural_gradient={"abort_after": 2}, **quiet)
    run = train(settings, tmp_path, max_updates=1).directory
    original = getattr(Ordinal, method)
    with monkeypatch.context() as patch:
        patch.setattr(Ordinal, method, lambda *args: spoil(original(*args)))
        message = rf"2 updates in a row met NaN, infinity or negative curvature \(last: {reason}\).*{run}"
        with pytest.raises(TrainingError, match=message):
            resume(run)
    assert_finite(last_state(run))
    assert last_state(run)["counters"]["updates"] == 3
    assert len(table(run, PROGRESS_FILE)) == 3  # that of the update that was too much, too
    if where == "gradient":  # a policy that rests meets nothing
        settings = settings.model_copy(update={"learning_starts": settings.total_steps})
    assert Trainer(settings, resume=run, console=False).train().evaluation is not None


def test_broken_updates_are_counted_over_resumes(tmp_path: Path, monkeypatch: Patch) -> None:
    settings = config("Pendulum-v1", natural_gradient={"abort_after": 2}, evaluation={"every_steps": 0})
    score = Ordinal.score
    monkeypatch.setattr(Ordinal, "score", lambda *args: score(*args) * math.nan)
    run = train(settings, tmp_path, max_updates=1).directory
    with pytest.raises(TrainingError, match="2 updates in a row met NaN"):
        resume(run, max_updates=1)
    assert [float(row["trust_region/skipped_updates"]) for row in table(run, PROGRESS_FILE)] == [1, 2]


def test_broken_updates_with_a_refused_one_between_them_are_not_in_a_row(tmp_path: Path, monkeypatch: Patch) -> None:
    broken = StepReport(Outcome.NONFINITE_GRADIENT)
    refused = StepReport(Outcome.NO_CANDIDATE, search=LineSearchResult(0.0, 0.0, 0.0, 1, (Rejection.KL,)))
    steps = iter([broken, refused, broken, refused])
    monkeypatch.setattr(trpo.agent, "trust_region_step", lambda *args, **options: next(steps))
    run = train(config(natural_gradient={"abort_after": 2}), tmp_path)
    assert run.evaluation is not None  # it has come to its end
    assert [float(row["trust_region/skipped_updates"]) for row in table(run.directory, PROGRESS_FILE)] == [1, 2, 3, 4]


@pytest.mark.parametrize("reward", [0.0, 1.0, -1e6])
@pytest.mark.parametrize("length", [None, 1])
def test_a_constant_reward_makes_no_nan(reward: float, length: int | None, tmp_path: Path) -> None:
    """Everything is constant, so all advantages are equal: nothing to learn, and the policy stays as it is."""
    settings = plain_config({"reward": reward, "length": length})
    trainer = Trainer(settings, root=tmp_path, console=False)
    theta = trainer.agent.policy.theta.vector.clone()
    updates_of(trainer, 3)
    trainer._save_checkpoint()
    trainer.close()
    assert_finite(last_state(trainer.run.path))
    if length == 1:  # else the value of the last state of each rollout tells it apart while V is being fitted
        assert torch.equal(trainer.agent.policy.theta.vector, theta)
        assert "left the policy unchanged: zero gradient" in (trainer.run.path / "log.txt").read_text()
    for row in table(trainer.run.path, PROGRESS_FILE):
        assert math.isfinite(float(row["train/value_loss"])) and math.isfinite(float(row["trust_region/entropy"]))


@pytest.mark.parametrize("backend", ["gymnasium", "gymnasium-async"])
def test_an_environment_that_raises_while_it_is_closed_costs_nothing(
    backend: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    env = {"id": "faulty_envs:Careless-v0", "num_envs": 3, "backend": backend, "workers": 1, "kwargs": {"raises": True}}
    result = Trainer(config(env=env), root=tmp_path, console=False).train()
    assert result.evaluation is not None and load_policy(result.directory).path.name == "final"
    told = "warning: an environment was not closed: it raised RuntimeError: no handle to free (tests/faulty_envs.py:"
    said = [record.message for record in caplog.records if told in record.message]
    assert len(said) > 1  # those of evaluations are of this process whatever the backend


def test_a_vector_environment_that_raises_while_it_is_closed_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    given = VectorEnvAdapter(gymnasium.make_vec("faulty_envs:Careless-v0", num_envs=2, raises=True))
    given.close()
    assert [record.message.count("it raised RuntimeError: no handle to free") for record in caplog.records] == [1]
    given._env.closed = True  # or it is closed once more when it is deleted


def test_what_an_evaluation_raises_comes_after_a_checkpoint(tmp_path: Path, monkeypatch: Patch) -> None:
    """Whatever it is: only a bug of ours or of a package raises other than `EnvError`."""

    def broken(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError

    trainer = Trainer(config(checkpoint={"every_steps": 0}), root=tmp_path, console=False)
    monkeypatch.setattr(evaluations, "evaluate", broken)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert len(checkpoint_paths(trainer.run.checkpoints)) == 1


def test_an_environment_that_changes_the_working_directory_does_not_take_the_run_along(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    home.mkdir()
    elsewhere.mkdir()
    monkeypatch.chdir(home)
    env = {"id": "faulty_envs:Careless-v0", "num_envs": 3, "kwargs": {"folder": str(elsewhere)}}
    run = Trainer(config(env=env), root="runs", console=False).train(max_updates=2).directory
    assert [*elsewhere.iterdir()] == [] and run.is_relative_to(home)
    monkeypatch.chdir(home)
    result = Trainer(config(env=env), resume=run.relative_to(home), console=False).train()
    assert [*elsewhere.iterdir()] == [] and (home / result.directory / "final").is_dir()
    monkeypatch.setattr(run_directory, "_STARTED_IN", home)
    assert str(RunDirectory(run)) == str(run.relative_to(home)), "as one would write it there"
    gone = tmp_path / "gone"
    gone.mkdir()
    env["kwargs"]["folder"] = str(gone)
    trainer = Trainer(config(env=env), root=tmp_path / "others", console=False)
    gone.rmdir()
    assert trainer.train(max_updates=1).directory.is_dir()
    monkeypatch.chdir(home)


@pytest.mark.parametrize(
    "settings",
    [
        {"value": {"hidden_sizes": (10**6, 10**10)}},
        {"value": {"hidden_sizes": (10**24,)}},
        {"batch_size": 96 * 10**12, "total_steps": 96 * 10**12},
        {"batch_size": 96 * 10**24, "total_steps": 96 * 10**24},
    ],
)
def test_what_does_not_fit_into_memory_is_one_clear_error(settings: dict[str, Any], tmp_path: Path) -> None:
    message = r"does not fit into memory \(.*\): make hidden_sizes, policy.bins, .* smaller"
    with pytest.raises(UserError, match=message) as caught:
        Trainer(plain_config(**settings), root=tmp_path, console=False)
    assert "\n" not in str(caught.value)
    assert not [*tmp_path.iterdir()]


def test_moments_that_overflow_are_undone_as_a_loss_is() -> None:
    """Of gradients beyond 2e19 the square is no float32; after one small step nothing else need show it."""
    value = ValueFunction(make_mlp([2, 4, 1], activation="relu", dtype=torch.float32))
    fit = AdamFit(AdamFitConfig(epochs=1), value, generator=seeded(), learning_rate=lambda progress: 1e-30)
    before = last_copy(fit.state_dict())
    report = fit.fit(value, torch.full((128, 2), 1e4), torch.full((128,), 1e17), progress=0.0)
    assert report.nonfinite and report.refused == report.steps == 1 and math.isfinite(report.loss_after)
    assert differences(before, last_copy(fit.state_dict())) == []


@pytest.mark.parametrize("fit", ["adam", "gauss_newton"])
def test_a_value_function_that_diverges_leaves_policy_and_optimiser_clean(fit: str, tmp_path: Path) -> None:
    """Rewards of 1e30 are numbers, but the square of their error is none in float32."""
    settings = plain_config(
        {"reward": 1e30, "length": 7}, normalize={"rewards": False}, value={"hidden_sizes": (8,), "fit": fit}
    )
    trainer = Trainer(settings, root=tmp_path, console=False)
    before = trainer.agent.state_dict()
    value, optimiser = ({k: v.clone() for k, v in before["value"].items()}, last_copy(before["value_fit"]))
    updates_of(trainer, 3)
    trainer._save_checkpoint()
    trainer.close()
    after = trainer.agent.state_dict()
    assert differences(value, dict(after["value"])) == []
    assert differences(optimiser, last_copy(after["value_fit"])) == []
    assert trainer.skipped_updates == 0  # the policy has learned meanwhile
    assert_finite(last_state(trainer.run.path))
    assert all(float(row["value/refused_steps"]) > 0 for row in table(trainer.run.path, PROGRESS_FILE))
    assert (trainer.run.path / "log.txt").read_text().count("the value fit met a non-finite loss") == 3


def last_copy(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: last_copy(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(last_copy(value) for value in tree)
    return tree.clone() if isinstance(tree, torch.Tensor) else tree


# --- 16: spaces ---

UNBOUNDED = Box(-np.inf, np.inf, (2,), np.float32)


@pytest.mark.parametrize(
    ("observation", "action"),
    [
        (Dict({"a": Box(-1, 1, (2,), np.float32), "b": Discrete(3)}), MultiDiscrete([2, 3], start=[1, 5])),
        (Box(-np.inf, np.inf, (2,), np.float32), UNBOUNDED),
    ],
)
def test_uncommon_spaces_train_save_and_act(
    observation: Any, action: Any, tmp_path: Path, monkeypatch: Patch, trainer_of: Callable[..., Trainer]
) -> None:
    monkeypatch.setitem(
        gymnasium.registry,
        "Spaces-v0",
        gymnasium.envs.registration.EnvSpec("Spaces-v0", lambda: Plain(1.0, 5, observation, action)),
    )
    settings = config("Spaces-v0", total_steps=192, policy={"bins": None, "std": 3.0}, evaluation={"every_steps": 0})
    trainer = trainer_of(settings, tmp_path)
    environment = trainer.env._shard._envs[0].unwrapped
    rollout, _ = trainer.collector.collect()
    received, stored = np.stack(environment.received), rollout.action[:, 0].numpy()
    if action is UNBOUNDED:
        # Actions are never rescaled, only clipped to bounds that are finite; so there is nothing to warn of.
        assert np.array_equal(received, stored) and np.abs(stored).max() > 3
    else:
        assert np.array_equal(received, stored + action.start)
    trainer.train()
    policy = load_policy(trainer.run.final)
    assert action.contains(policy.act(np.zeros(policy.obs_dim)))


# --- 23: runs that hardly begin ---


def test_a_file_system_that_refuses_writes_is_one_clear_line(
    tmp_path: Path, capsys: Capture, monkeypatch: Patch
) -> None:
    (tmp_path / "config.yaml").write_text(dump_config(config()), encoding="utf-8")
    arguments = ("--config", tmp_path / "config.yaml", "--root", "/sys/runs")  # refused even to root
    outcome = run_script("train.py", *arguments, capture=capsys, patch=monkeypatch)
    assert outcome.status == 2
    assert re.search(r"cannot make a run in /sys/runs: .*choose another directory", one_line(outcome.err))


def test_a_run_in_which_no_episode_ends_has_curves_without_returns_and_is_resumed(tmp_path: Path) -> None:
    trainer = Trainer(plain_config(), root=tmp_path, console=True)
    run = trainer.train(max_updates=1).directory
    resume(run, max_updates=1)
    rows = table(run, PROGRESS_FILE)
    assert [row["env_steps"] for row in rows] == ["96", "192"]
    assert {row["rollout/ep_rew_mean"] for row in rows} == {""}
    assert last_state(run)["processes"][0]["collector"]["running_length"].tolist() == [64, 64, 64]
    events = EventAccumulator(str(run))
    events.Reload()
    assert "rollout/ep_rew_mean" not in events.Tags()["scalars"]


def test_fewer_steps_than_a_batch_are_refused_at_once(tmp_path: Path, capsys: Capture, monkeypatch: Patch) -> None:
    (tmp_path / "config.yaml").write_text(dump_config(config()), encoding="utf-8")
    arguments = ("--config", tmp_path / "config.yaml", "--root", tmp_path / "runs", "--set", "total_steps=95")
    outcome = run_script("train.py", *arguments, capture=capsys, patch=monkeypatch)
    assert outcome.status == 2 and "not one update fits" in one_line(outcome.err)
    assert not (tmp_path / "runs").exists()


# --- the page that lists all of it ---

TABLE = PROJECT / "docs" / "reliability.md"


def test_every_fault_has_a_promise_and_a_test_that_exists() -> None:
    rows = re.findall(r"^\| (\d+) \| .+? \| .+? \| (.+) \|$", TABLE.read_text(encoding="utf-8"), re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 33))
    for number, tests in rows:
        named = re.findall(r"`(tests/\w+\.py)::(\w+)`", tests)
        assert named, f"row {number} names no test"
        for file, name in named:
            tree = ast.parse((PROJECT / file).read_text(encoding="utf-8"))
            functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
            assert name in functions, f"row {number}: {file} has no {name}"


def test_auto_refuses_a_config_file_that_was_changed_since(tmp_path: Path, capsys: Capture, monkeypatch: Patch) -> None:
    run = train(config(), tmp_path / "runs", max_updates=1).directory
    changed = tmp_path / "changed.yaml"
    changed.write_text(dump_config(config(natural_gradient={"max_kl": 0.02})), encoding="utf-8")
    arguments = ("--config", changed, "--root", tmp_path / "runs", "--resume", "auto")
    outcome = run_script("train.py", *arguments, capture=capsys, patch=monkeypatch)
    assert outcome.status == 2 and "natural_gradient.max_kl: " in one_line(outcome.err)
    assert last_state(run)["counters"]["updates"] == 1


def test_a_newer_schema_is_neither_passed_over_nor_deleted(tmp_path: Path) -> None:
    run = train(config(), tmp_path, max_updates=2).directory
    paths = checkpoint_paths(run / "checkpoints")
    manifest = paths[0] / "manifest.json"
    body = manifest.read_bytes().partition(b'"body": ')[2][:-2].replace(b'"schema": 1', b'"schema": 2')
    manifest.write_bytes(b'{"sha256": "%b", "body": %b}\n' % (hashlib.sha256(body).hexdigest().encode(), body))
    with pytest.raises(CheckpointError, match=r"its schema 2 is newer than 1.*update trpo"):
        resume(run)
    assert checkpoint_paths(run / "checkpoints") == paths


def test_damaged_events_do_not_keep_a_run_from_going_on(tmp_path: Path) -> None:
    undisturbed = train(config(), tmp_path / "a").directory
    run = train(config(), tmp_path / "b", max_updates=2).directory
    (events,) = run.glob("events.out.tfevents.*")
    data = bytearray(events.read_bytes())
    data[100:200] = bytes(100)
    events.write_bytes(data)
    resume(run)
    assert_same_run(undisturbed, run)
