"""A run that is stopped and resumed is, to the bit, the run that was left alone; and the same seed is the same run."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import command, config_for, one_line, run_process, run_script

from trpo.agent import Agent
from trpo.config import Config
from trpo.config.file import load_config
from trpo.errors import CheckpointError, EnvError, UserError
from trpo.run import record
from trpo.run.checkpoint import load_state, newest_checkpoint
from trpo.run.metrics import EVALUATIONS_FILE, PROGRESS_FILE
from trpo.run.saved_policy import load_policy, save_policy
from trpo.trainer import RunResult, Trainer

UPDATES = 4


def config(env_id: str = "CartPole-v1", fit: str = "adam", **changes: Any) -> Config:
    """Four updates, with episodes that span them, an evaluation and a checkpoint amid them, and schedules."""
    settings: dict[str, Any] = {
        "env": {"id": env_id, "num_envs": 3},
        "total_steps": 96 * UPDATES,
        "batch_size": 96,
        "device": "cpu",
        "value": {"hidden_sizes": (8,), "fit": fit, "adam": {"learning_rate": {"start": 1e-3, "end": 1e-4}}},
        "natural_gradient": {"max_kl": {"start": 0.05, "end": 0.01}, "fisher_subsample": 0.5},
        "evaluation": {"every_steps": 192, "episodes": 1, "final_episodes": 1},
        "checkpoint": {"every_steps": 96},
    }
    return config_for(env_id, **{**settings, **changes})


def train(config: Config, root: Path, *, max_updates: int | None = None) -> RunResult:
    return Trainer(config, root=root, console=False).train(max_updates=max_updates)


def resume(run: Path, *, max_updates: int | None = None) -> RunResult:
    return Trainer(load_config(run / "config.yaml"), resume=run, console=False).train(max_updates=max_updates)


def last_state(run: Path) -> Any:
    found = newest_checkpoint(run / "checkpoints")
    assert found is not None
    return found[1]


def table(run: Path, name: str) -> list[dict[str, str]]:
    """Rows of a CSV file as text, without the columns that tell the time."""
    with (run / name).open(encoding="utf-8") as file:
        rows = [*csv.DictReader(file)]
    return [{key: cell for key, cell in row.items() if not key.startswith("time/")} for row in rows]


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Places where two trees differ in type or in any bit."""
    if type(a) is not type(b):
        return [f"{where}: {type(a).__name__} and {type(b).__name__}"]
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return [f"{where}: other keys"]
        return [line for key in a for line in differences(a[key], b[key], f"{where}/{key}")]
    if isinstance(a, list | tuple):
        if len(a) != len(b):
            return [f"{where}: other length"]
        pairs = enumerate(zip(a, b, strict=True))
        return [line for i, (x, y) in pairs for line in differences(x, y, f"{where}/{i}")]
    if hasattr(a, "tobytes") or isinstance(a, torch.Tensor):
        x, y = (v.numpy() if isinstance(v, torch.Tensor) else v for v in (a, b))
        same = x.shape == y.shape and x.dtype == y.dtype and x.tobytes() == y.tobytes()
    else:
        same = a == b
    return [] if same else [where]


def assert_same_run(a: Path, b: Path) -> None:
    """Policy, value function, optimiser, normalisers, generators, environments, counters, and all that was logged."""
    states = [last_state(run) for run in (a, b)]
    for state in states:
        assert state["counters"].pop("elapsed_s") > 0
    assert differences(*states) == []
    assert differences(load_state(a / "final"), load_state(b / "final")) == []
    for name in (PROGRESS_FILE, EVALUATIONS_FILE):
        assert table(a, name) == table(b, name)


@pytest.mark.parametrize("fit", ["adam", "gauss_newton"])
@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1", "Hopper-v5"])
def test_stop_and_resume_is_the_undisturbed_run(env_id, fit, tmp_path):
    undisturbed = train(config(env_id, fit), tmp_path / "a").directory
    stopped = train(config(env_id, fit), tmp_path / "b", max_updates=1)
    assert stopped.evaluation is None and stopped.env_steps == 96
    run = stopped.directory
    assert resume(run, max_updates=2).env_steps == 3 * 96
    assert resume(run).env_steps == UPDATES * 96
    assert_same_run(undisturbed, run)
    assert len(table(run, PROGRESS_FILE)) == UPDATES


def test_so_it_is_without_normalisation(tmp_path):
    # With actions of any value, so that the last bit of an observation shows.
    settings = {"normalize": {"observations": False}, "policy": {"bins": None}}
    undisturbed = train(config("Hopper-v5", **settings), tmp_path / "a").directory
    run = train(config("Hopper-v5", **settings), tmp_path / "b", max_updates=1).directory
    resume(run)
    assert_same_run(undisturbed, run)


@pytest.mark.parametrize("cut", [1, 2])
def test_so_it_is_before_learning_starts(cut, tmp_path):
    settings = {"learning_starts": 192, "reuse_rollouts": 2}
    undisturbed = train(config(**settings), tmp_path / "a").directory
    run = train(config(**settings), tmp_path / "b", max_updates=cut).directory
    resume(run)
    assert_same_run(undisturbed, run)


def test_what_was_trained_after_the_last_checkpoint_is_trained_again(tmp_path):
    """As after a crash: the directory holds metrics, a best policy and an evaluation that the checkpoint knows not."""
    undisturbed = train(config(), tmp_path / "a").directory
    run = train(config(), tmp_path / "b", max_updates=3).directory
    for newer in sorted((run / "checkpoints").iterdir())[1:]:
        newer.rename(tmp_path / newer.name)
    resume(run)
    assert_same_run(undisturbed, run)


def test_the_newest_checkpoint_that_is_whole_is_resumed(tmp_path, recwarn):
    undisturbed = train(config(), tmp_path / "a").directory
    run = train(config(), tmp_path / "b", max_updates=3).directory
    newest = max((run / "checkpoints").iterdir())
    data = bytearray((newest / "tensors.safetensors").read_bytes())
    data[-9] ^= 1
    (newest / "tensors.safetensors").write_bytes(data)
    resume(run)
    assert "skipped a damaged checkpoint" in (run / "log.txt").read_text()
    assert_same_run(undisturbed, run)


def test_the_same_seed_is_the_same_run_and_another_is_not(tmp_path):
    first = train(config(), tmp_path / "a").directory
    again = train(config(), tmp_path / "b").directory
    other = train(config(seed=1), tmp_path / "c").directory
    assert_same_run(first, again)
    assert table(first, PROGRESS_FILE) != table(other, PROGRESS_FILE)


def test_the_order_of_sets_and_dicts_plays_no_part(tmp_path):
    settings = config("Pendulum-v1", "gauss_newton")
    here = train(settings, tmp_path / "a").directory
    outcome = run_process("train.py", "--config", here / "config.yaml", "--root", tmp_path / "b", PYTHONHASHSEED="4711")
    assert outcome.status == 0, outcome.err
    (there,) = (tmp_path / "b" / "Pendulum-v1").iterdir()
    assert_same_run(here, there)


def test_a_run_without_a_checkpoint_or_of_other_shape_is_not_resumed(tmp_path, capsys):
    run = train(config(), tmp_path, max_updates=1).directory
    with pytest.raises(CheckpointError, match="does not fit"):
        Trainer(config(policy={"hidden_sizes": (4,)}), resume=run, console=False)
    for checkpoint in (run / "checkpoints").iterdir():
        (checkpoint / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="no valid checkpoint"):
        Trainer(config(), resume=run, console=False)
    assert "warning: skipped a damaged checkpoint" in capsys.readouterr().err


def test_sigterm_saves_a_checkpoint_and_the_run_goes_on_from_there(tmp_path, capsys, monkeypatch):
    # Long enough (a second or more) to be stopped between its first line of output and its end.
    quiet: dict[str, Any] = {"evaluation": {"every_steps": 0, "final_episodes": 1}, "checkpoint": {"every_steps": 0}}
    settings = config("Pendulum-v1", total_steps=96 * 60, **quiet)
    undisturbed = train(settings, tmp_path / "a").directory
    arguments = ("--config", undisturbed / "config.yaml", "--root", tmp_path / "b")
    with subprocess.Popen(command("train.py", *arguments), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert "Pendulum-v1 on cpu, in " in process.stdout.readline()
        assert "steps/s" in process.stdout.readline()  # the first update is done
        process.send_signal(signal.SIGTERM)
        rest = process.stdout.read()
    assert process.returncode == 128 + signal.SIGTERM
    (run,) = (tmp_path / "b" / "Pendulum-v1").iterdir()
    assert f"stopped by SIGTERM at {last_state(run)['counters']['env_steps']} steps" in rest
    assert last_state(run)["counters"]["updates"] < 60
    assert not (run / "final").exists()
    outcome = run_script("train.py", "--resume", run, capture=capsys, patch=monkeypatch)
    assert outcome.status == 0 and outcome.err == ""
    assert_same_run(undisturbed, run)


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_stop_signal_ends_the_run_after_the_update_under_way(stop, tmp_path, monkeypatch):
    trainer = Trainer(config(), root=tmp_path, console=False)
    collect = trainer.collector.collect

    def interrupted() -> Any:
        if trainer.updates == 1:
            signal.raise_signal(stop)
        return collect()

    monkeypatch.setattr(trainer.collector, "collect", interrupted)
    before = signal.getsignal(stop)
    result = trainer.train()
    assert result.stopped_by == stop and result.exit_status == 128 + stop
    assert result.env_steps == 2 * 96 and result.evaluation is None
    assert last_state(result.directory)["counters"]["updates"] == 2
    assert signal.getsignal(stop) == before


def test_a_second_sigint_interrupts_at_once(tmp_path, monkeypatch):
    trainer = Trainer(config(), root=tmp_path, console=False)

    def impatient() -> Any:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(trainer.collector, "collect", impatient)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.updates == 0


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    run = train(config(), tmp_path).directory
    before = [table(run, name) for name in (PROGRESS_FILE, EVALUATIONS_FILE)], load_state(run / "final")
    result = resume(run)
    assert result.env_steps == UPDATES * 96 and result.evaluation is None
    assert [table(run, name) for name in (PROGRESS_FILE, EVALUATIONS_FILE)] == before[0]
    assert differences(load_state(run / "final"), before[1]) == []


@pytest.mark.parametrize(("record", "said"), [("cuda:0", True), ("cpu", False), (None, False)])
def test_a_run_that_goes_on_on_another_device_says_so(record, said, tmp_path):
    run = train(config(), tmp_path, max_updates=1).directory
    meta = json.loads((run / "meta.json").read_text())
    (run / "meta.json").write_text(json.dumps(meta | {"device": record}) if record else "{")
    resume(run)
    note = "note: this run began on cuda and continues on cpu, which rounds differently"
    assert (note in (run / "log.txt").read_text()) is said


@pytest.mark.parametrize(
    ("git", "said"),
    [
        ({"revision": "0123456789abcdef", "dirty": False}, "0123456789 and"),
        ({"revision": "fedcba98765", "dirty": True}, "fedcba9876 with changes and"),
        (None, None),
        ("the same", None),
    ],
)
def test_a_run_that_goes_on_with_other_code_says_so(git, said, tmp_path, monkeypatch):
    monkeypatch.setattr(record, "_git_state", lambda package: {"revision": "fedcba9876543210", "dirty": False})
    run = train(config(), tmp_path, max_updates=1).directory
    if git != "the same":
        meta = json.loads((run / "meta.json").read_text())
        (run / "meta.json").write_text(json.dumps(meta | {"git": git}))
    resume(run)
    notes = [line for line in (run / "log.txt").read_text().splitlines() if "the code of commit" in line]
    assert len(notes) == (said is not None)
    assert not said or f"began with the code of commit {said} continues with fedcba9876" in notes[0]


def test_a_checkpoint_without_a_part_of_the_state_names_it(tmp_path):
    """As one of a run from before that part was added."""
    run = train(config(), tmp_path, max_updates=1).directory

    class WithMore(Agent):
        def load_state_dict(self, state):
            self.more = state["more"]

    with pytest.raises(CheckpointError, match=r"does not fit this config \(it has no 'more'; total_steps: "):
        Trainer(config(total_steps=96 * 9), resume=run, console=False, make_agent=WithMore)


def test_a_run_keeps_its_batch_size(tmp_path):
    """Updates are what schedules and the end of a run are counted in."""
    run = train(config(), tmp_path, max_updates=1).directory
    with pytest.raises(UserError, match="batch_size cannot change within a run"):
        Trainer(config(batch_size=48), resume=run, console=False)


def test_a_prolonged_run_has_no_final_policy_until_its_new_end(tmp_path):
    run = train(config(), tmp_path).directory
    old = load_policy(run).info["env_steps"]
    Trainer(config(total_steps=96 * (UPDATES + 2)), resume=run, console=False).train(max_updates=1)
    # 0.05 → 0.01 in a straight line, four fifths of which lie behind the four updates of six.
    assert "note: schedules run to the new end; the KL of the next update may be 0.018" in (run / "log.txt").read_text()
    assert not (run / "final").exists()
    assert load_policy(run / "final-1").info["env_steps"] == old
    assert load_policy(run).path == run / "best"
    resume(run)
    assert load_policy(run).info["env_steps"] == old + 2 * 96


def test_a_failing_evaluation_costs_no_training(tmp_path, monkeypatch):
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise EnvError("the environment broke")

    settings = config(checkpoint={"every_steps": 0})
    with monkeypatch.context() as patch:
        patch.setattr("trpo.run.evaluations.evaluate", broken)
        with pytest.raises(EnvError, match="broke"):
            train(settings, tmp_path)
    (run,) = (tmp_path / "CartPole-v1").iterdir()
    assert last_state(run)["counters"]["updates"] == 2  # the evaluation of 192 steps was the first
    assert resume(run).env_steps == UPDATES * 96


def test_command_refuses_to_resume_what_is_no_run_in_one_line(tmp_path, capsys, monkeypatch):
    run = train(config(), tmp_path, max_updates=1).directory
    for arguments, problem in (
        (("--resume", tmp_path / "nowhere"), "nowhere"),
        (("--resume", run, "--set", "policy.hidden_sizes=[4]"), "does not fit"),
    ):
        outcome = run_script("train.py", *arguments, capture=capsys, patch=monkeypatch)
        assert outcome.status == 2
        assert problem in one_line(outcome.err)


def test_a_better_policy_from_after_the_checkpoint_stays_the_best(tmp_path):
    """As of a run that was killed between an evaluation and the next checkpoint, and then goes on otherwise."""
    run = train(config(), tmp_path, max_updates=2).directory
    saved = load_policy(run / "best")
    later = {**saved.info, "env_steps": 10**6, "evaluation": {**saved.info["evaluation"], "eval/mean_reward": 1e6}}
    save_policy(run / "best", saved.policy, saved.config, saved.action_space, later)
    trainer = Trainer(config(), resume=run, console=False)
    assert trainer.best_return == 1e6
    trainer.train()
    assert load_policy(run / "best").info == later
