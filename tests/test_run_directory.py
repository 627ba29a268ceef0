"""Run directories: exclusive creation, what is recorded, the lock, and which run is resumed."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn, Self

import numpy as np
import pytest
import torch
from forks import fork

from trpo import native
from trpo.config import Config
from trpo.config.file import load_config
from trpo.errors import CheckpointError, ConfigError, UserError
from trpo.run import directory as run_directory
from trpo.run import record
from trpo.run.checkpoint import CheckpointStore, load_state, save_state
from trpo.run.directory import RunDirectory, RunDirectoryError, find_run


def config(env_id: str = "Pendulum-v1", **settings: Any) -> Config:
    return Config.model_validate({"env": {"id": env_id, **settings.pop("env", {})}, **settings})


class FrozenClock(datetime):
    """Every run starts in the same second."""

    @classmethod
    def now(cls, tz: Any = None) -> Self:
        return cls(2026, 11, 22, 14, 5, 1, tzinfo=tz)


@pytest.fixture
def frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_directory, "datetime", FrozenClock)


def refusal(action: Callable[[], Any], kind: type[UserError]) -> str:
    with pytest.raises(kind) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def with_checkpoint(run: RunDirectory, step: int = 1) -> RunDirectory:
    CheckpointStore(run.checkpoints, keep=2).save({}, env_steps=step)
    return run


# --- creation ---


def test_the_layout_of_a_new_run(tmp_path: Path, frozen: None) -> None:
    run = RunDirectory.create(tmp_path / "runs", config(name="trial", seed=7))
    assert run.path == tmp_path / "runs" / "Pendulum-v1" / "trial-s7-20261122-140501"
    assert sorted(os.listdir(run.path)) == ["checkpoints", "config.yaml", "meta.json"]
    assert [run.checkpoints.name, run.best.name, run.final.name, run.videos.name] == [
        "checkpoints",
        "best",
        "final",
        "videos",
    ]
    # They appear when there is something to hold.
    assert not (run.best.exists() or run.final.exists() or run.videos.exists())


def test_runs_of_one_second_get_directories_of_their_own(tmp_path: Path, frozen: None) -> None:
    names = [RunDirectory.create(tmp_path, config()).path.name for _ in range(3)]
    assert names == [f"trpo-s0-20261122-140501{suffix}" for suffix in ("", "-2", "-3")]


@pytest.fixture
def tokyo(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "Asia/Tokyo")
        time.tzset()
        yield
    time.tzset()


def test_the_stamp_is_utc(tmp_path: Path, tokyo: None) -> None:
    before = f"{datetime.now(UTC):%Y%m%d-%H%M%S}"
    name = RunDirectory.create(tmp_path, config()).path.name
    assert before <= name.removeprefix("trpo-s0-") <= f"{datetime.now(UTC):%Y%m%d-%H%M%S}"


@pytest.mark.parametrize(
    ("env_id", "name"),
    [("my.pkg:Env-v0", "my.pkg-Env-v0"), ("ALE/Pong-v5", "ALE-Pong-v5"), ("../../up", "-..-up"), ("..", "environment")],
)
def test_environment_ids_are_one_harmless_path_component(tmp_path: Path, env_id: str, name: str) -> None:
    run = RunDirectory.create(tmp_path / "runs", config(env_id))
    assert run.path.parent == tmp_path / "runs" / name
    assert os.listdir(tmp_path) == ["runs"]


def test_the_saved_config_is_the_config(tmp_path: Path) -> None:
    given = config(name="a", gae={"lambda": 0.9}, natural_gradient={"max_kl": {"start": 0.02, "end": 1e-3}})
    run = RunDirectory.create(tmp_path, given)
    assert load_config(RunDirectory.open(run.path).config_file) == given


def test_meta_records_the_circumstances_and_not_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["train.py", "--seed", "3"])
    meta = json.loads(RunDirectory.create(tmp_path, config(device="auto")).meta_file.read_text())
    assert set(meta) == {"started", "command", "device", "versions", "native", "python", "platform", "git"}
    assert meta["command"] == ["train.py", "--seed", "3"] and meta["device"] == "cpu"
    assert meta["native"] is native.available()
    assert meta["versions"]["torch"] == torch.__version__ and meta["versions"]["numpy"] == np.__version__
    assert set(meta["versions"]) == {"trpo", "torch", "numpy", "gymnasium", "mujoco"}
    assert meta["python"] == platform.python_version() and meta["platform"] == platform.platform()
    assert datetime.fromisoformat(meta["started"]).tzinfo is not None


def test_a_package_that_is_not_installed_has_no_version() -> None:
    assert record._version("no-such-package-anywhere") is None


def test_a_file_in_the_way_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    message = refusal(lambda: RunDirectory.create(tmp_path / "file", config()), RunDirectoryError)
    assert str(tmp_path / "file") in message and "choose another directory" in message


def test_a_read_only_directory_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert "Read-only file system" in refusal(lambda: RunDirectory.create(tmp_path, config()), RunDirectoryError)


def test_a_run_that_cannot_be_completed_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, content: bytes) -> NoReturn:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_directory, "write_durably", refuse)
    assert "No space left" in refusal(lambda: RunDirectory.create(tmp_path, config()), RunDirectoryError)
    assert os.listdir(tmp_path / "Pendulum-v1") == []


@pytest.mark.parametrize("name", ["", "file", "nowhere"])
def test_opening_what_is_no_run(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    assert "is not a run" in refusal(lambda: RunDirectory.open(tmp_path / name), CheckpointError)


# --- git ---


def git(directory: Path, *arguments: str) -> str:
    """Git in a directory of the test's own: nothing of the surrounding repository or the user's settings reaches it."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    environment |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    command = ["git", "-C", str(directory), *identity, *arguments]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.strip()


def test_the_revision_and_whether_it_was_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "trpo"
    package.mkdir()
    (package / "__init__.py").write_text("")
    assert record._git_state(package) is None
    git(tmp_path, "init", "-q")
    assert record._git_state(package) is None  # no revision, and the package is not tracked
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "one")
    revision = git(tmp_path, "rev-parse", "HEAD")
    (tmp_path / "untracked").write_text("")
    monkeypatch.setenv("GIT_DIR", "/nonexistent")  # as in a hook of another repository
    assert record._git_state(package) == {"revision": revision, "dirty": False}
    (package / "__init__.py").write_text("changed")
    assert record._git_state(package) == {"revision": revision, "dirty": True}
    installed = tmp_path / "site-packages"
    installed.mkdir()
    (installed / "__init__.py").write_text("")
    assert record._git_state(installed) is None  # a copy inside somebody else's checkout


def test_no_git_is_no_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert record._git_state(Path(record.__file__).parent) is None


# --- lock ---


def test_the_second_trainer_is_refused(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path, config())
    with run.lock():
        message = refusal(run.lock, RunDirectoryError)
        assert re.search(rf"in use by process {os.getpid()}; stop it", message) and str(run.path) in message
    first = run.lock()
    first.release()
    first.release()
    with run.lock():
        first.release()  # a lock that was released lets go of nobody else's
        refusal(run.lock, RunDirectoryError)


def test_the_lock_ends_with_its_process_even_where_a_fork_lives_on(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path, config())
    ready, report = os.pipe()
    hold, keep = os.pipe()

    def worker() -> None:
        os.close(keep)
        os.write(report, os.getpid().to_bytes(4, "big"))
        os.read(hold, 1)  # until the test lets go

    def trainer() -> None:
        lock = run.lock()
        fork(worker)
        signal.pause()
        lock.release()

    pid = fork(trainer)
    os.read(ready, 4)
    assert f"process {pid};" in refusal(run.lock, RunDirectoryError)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    run.lock().release()
    for descriptor in (keep, hold, ready, report):
        os.close(descriptor)


def test_a_fork_cannot_release_the_lock_of_its_parent(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path, config())
    with run.lock() as lock:
        _, status = os.waitpid(fork(lock.release), 0)
        assert status == 0
        refusal(run.lock, RunDirectoryError)


def test_locking_clears_what_a_killed_save_left(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path, config())
    dead = fork(lambda: None)
    os.waitpid(dead, 0)
    (run.path / f".best.tmp-{dead}-0123abcd").mkdir()
    run.lock().release()
    assert not [name for name in os.listdir(run.path) if name.startswith(".best")]


def test_a_lock_that_cannot_be_made_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot lock" in refusal(RunDirectory(tmp_path / "file").lock, RunDirectoryError)

    def unsupported(*_: Any) -> NoReturn:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    assert "No locks available" in refusal(RunDirectory(tmp_path).lock, RunDirectoryError)


# --- resuming ---


def test_the_newest_run_with_a_checkpoint_is_found(tmp_path: Path) -> None:
    parent = tmp_path / "Pendulum-v1"

    def make(directory: str, *, checkpoint: bool = True, **settings: Any) -> Path:
        run = RunDirectory.create(tmp_path, config(**settings))
        run.path.rename(parent / directory)
        if checkpoint:
            with_checkpoint(RunDirectory(parent / directory))
        return parent / directory

    assert find_run(tmp_path, config()) is None
    make("trpo-s0-20261122-140501")
    second = make("trpo-s0-20261122-140501-2")
    tenth = make("trpo-s0-20261122-140501-10")
    make("trpo-s0-20261123-000000", checkpoint=False)
    make("trpo-s1-20261124-000000", seed=1)
    make("trpo-s0-x-s0-20261124-000000", name="trpo-s0-x")
    make("trpo-s00-20261124-000000")
    (parent / "trpo-s0-20261125-000000").write_text("a file")
    assert find_run(tmp_path, config()) == tenth
    for entry in tenth.rglob("step-*/*"):
        entry.unlink()
    next(tenth.rglob("step-*")).rmdir()
    assert find_run(tmp_path, config()) == second


def test_environments_that_share_a_file_name_are_told_apart(tmp_path: Path) -> None:
    run = with_checkpoint(RunDirectory.create(tmp_path, config("a:Env-v0")))
    assert find_run(tmp_path, config("a-Env-v0")) is None
    assert find_run(tmp_path, config("a:Env-v0")) == run.path


@pytest.mark.parametrize("damage", [lambda file: file.unlink(), lambda file: file.write_text("env: [")])
def test_a_candidate_that_cannot_be_read_is_an_error_not_a_fresh_start(
    tmp_path: Path, damage: Callable[[Path], Any]
) -> None:
    run = with_checkpoint(RunDirectory.create(tmp_path, config()))
    damage(run.config_file)
    with pytest.raises((CheckpointError, ConfigError), match=re.escape(str(run.path))):
        find_run(tmp_path, config())


def test_best_is_replaced_whole(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path, config())
    for value in (1, 2):
        save_state(run.best, {"return": value}, replace=True)
    assert load_state(run.best) == {"return": 2}


def test_settings_are_changed_whatever_a_killed_process_left_there(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path, config())
    (run.path / f".config.yaml.partial-{os.getpid()}").write_text("half")
    run.change_config(config().model_copy(update={"seed": 7}))
    assert load_config(run.config_file).seed == 7
    assert sorted(path.name for path in run.path.iterdir()) == ["checkpoints", "config.yaml", "meta.json"]
