"""A run's directory: where it lies, what is recorded at its start, who may write to it, and which one to resume."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shlex
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from trpo.config import Config
from trpo.config.file import dump_config, load_config
from trpo.errors import CheckpointError, UserError
from trpo.run.checkpoint import checkpoint_paths, remove_stale
from trpo.run.record import circumstances
from trpo.run.whole_file import replace_durably, sync_directory, write_durably

_held_locks: set[int] = set()  # file descriptors


class RunDirectoryError(UserError):
    """A run's directory cannot be made or is in use."""


try:
    _STARTED_IN: Path | None = Path.cwd()  # an environment may change the working directory
except OSError:
    _STARTED_IN = None


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """`runs/<environment>/<name>-s<seed>-<stamp>/`. TensorBoard events and CSV files lie in `path` itself."""

    path: Path

    def __str__(self) -> str:
        """As one would give it to a command where this one was started."""
        here = _STARTED_IN
        return str(self.path.relative_to(here) if here and self.path.is_relative_to(here) else self.path)

    @property
    def to_resume(self) -> str:
        """The arguments that go on with it, to be pasted into a shell."""
        return f"--resume {shlex.quote(str(self))}"

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

    @property
    def meta_file(self) -> Path:
        return self.path / "meta.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def best(self) -> Path:
        return self.path / "best"

    @property
    def final(self) -> Path:
        return self.path / "final"

    @property
    def policies(self) -> list[Path]:
        """Those that it has saved, that of the last update first."""
        return [path for path in (self.final, self.best) if path.is_dir()]

    @property
    def videos(self) -> Path:
        return self.path / "videos"

    @classmethod
    def create(cls, root: Path, config: Config) -> RunDirectory:
        """Makes a new directory under `root`, never an existing one, and records config and circumstances in it.

        The stamp is the time in UTC, so that runs sort by age whatever the machine's zone; runs of the same second get
        `-2`, `-3` …. `best` and `final` do not exist until they are saved.

        Raises:
            RunDirectoryError: nothing can be made there (read-only, a file in the way, disk full).
        """
        now = datetime.now(UTC)
        parent = root / _file_name(config.env.id)
        name = f"{config.name}-s{config.seed}-{now:%Y%m%d-%H%M%S}"
        try:
            parent.mkdir(parents=True, exist_ok=True)
            run = cls(_make_exclusively(parent, name))
            with _removed_on_failure(run.path):
                run.checkpoints.mkdir()
                write_durably(run.meta_file, json.dumps(circumstances(config, now), indent=2).encode())
                write_durably(run.config_file, dump_config(config).encode())
                sync_directory(run.path)
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise RunDirectoryError(f"cannot make a run in {root}: {reason}; choose another directory") from error
        return run

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """An existing run.

        Raises:
            CheckpointError: `path` is not a run.
        """
        run = cls(path)
        if not run.config_file.is_file():
            problem = "has no config.yaml" if path.is_dir() else "is not a directory"
            raise CheckpointError(f"{path} is not a run: it {problem}; give a directory made by training")
        return run

    def change_config(self, config: Config) -> None:
        """Records other settings, those that a resumed run goes on with.

        Raises:
            RunDirectoryError: the file cannot be written.
        """
        try:
            replace_durably(self.config_file, dump_config(config).encode())
        except OSError as error:
            raise RunDirectoryError(f"cannot write {self.config_file}: {error.strerror or error}") from error

    def set_final_aside(self) -> None:
        """Renames the policy of a run that goes on beyond its end: `final` is always that of the last update.

        Raises:
            RunDirectoryError: it cannot be renamed.
        """
        if not self.final.is_dir():
            return
        try:
            aside = next(path for n in count(1) if not (path := self.path / f"final-{n}").exists())
            self.final.rename(aside)
        except OSError as error:
            raise RunDirectoryError(f"cannot rename {self.final}: {error.strerror or error}") from error

    def lock(self) -> RunLock:
        """Makes this process the only one that writes here, until `release`, the end of `with`, or its death.

        Having it, removes what a killed predecessor left half written in the directory.

        Raises:
            RunDirectoryError: another process has it, or the file system does not support locks.
        """
        lock = RunLock(self.path)
        with contextlib.suppress(OSError):  # leftovers only cost space
            remove_stale(self.path)
        return lock


class RunLock:
    """An exclusive lock on a run's directory, held by the process and not by its forks."""

    def __init__(self, directory: Path) -> None:
        file = directory / ".lock"
        try:
            self._descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise RunDirectoryError(f"cannot lock the run {directory}: {error.strerror}") from error
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.truncate(self._descriptor, 0)
            os.pwrite(self._descriptor, str(os.getpid()).encode(), 0)
        except OSError as error:
            owner = os.pread(self._descriptor, 20, 0).decode(errors="replace") or "(unknown)"
            os.close(self._descriptor)
            if isinstance(error, BlockingIOError):
                message = f"the run {directory} is in use by process {owner}; stop it or start another run"
            else:
                message = f"cannot lock the run {directory}: {error.strerror}"
            raise RunDirectoryError(message) from error
        _held_locks.add(self._descriptor)

    def release(self) -> None:
        """Lets the next process in. May be called twice; does nothing in a fork."""
        if self._descriptor in _held_locks:
            _held_locks.remove(self._descriptor)
            os.close(self._descriptor)
        self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def find_run(root: Path, config: Config) -> Path | None:
    """The newest run under `root` of the same environment, name and seed that has a checkpoint; None without one.

    Raises:
        CheckpointError, ConfigError: a run that may be the one cannot be read.
        RunDirectoryError: the directory of runs cannot be read.
    """
    parent = root / _file_name(config.env.id)
    pattern = re.compile(rf"{re.escape(config.name)}-s{config.seed}-(\d{{8}}-\d{{6}})(?:-(\d+))?")
    try:
        names = os.listdir(parent) if parent.is_dir() else []
    except OSError as error:
        raise RunDirectoryError(f"cannot look for runs in {parent}: {error.strerror}") from error
    matches = [match for name in names if (match := pattern.fullmatch(name))]
    for match in sorted(matches, key=lambda match: (match[1], int(match[2] or 1)), reverse=True):
        run = RunDirectory(parent / match[0])
        if not checkpoint_paths(run.checkpoints):
            continue
        # Two environment ids can share a file name, so the id is compared where it is written in full.
        if load_config(RunDirectory.open(run.path).config_file).env.id == config.env.id:
            return run.path
    return None


def _file_name(env_id: str) -> str:
    """An environment id as one component of a path: `module:Env-v0` → `module-Env-v0`."""
    return re.sub(r"[^\w.-]+", "-", env_id).lstrip(".") or "environment"


def _make_exclusively(parent: Path, name: str) -> Path:
    for number in count(1):
        path = parent / (name if number == 1 else f"{name}-{number}")
        with contextlib.suppress(FileExistsError):
            path.mkdir()
            return path
    raise AssertionError("unreachable")


@contextlib.contextmanager
def _removed_on_failure(path: Path) -> Any:
    try:
        yield
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        raise


def _close_locks_in_fork() -> None:
    # A child forked by an environment that outlives the trainer would otherwise keep the run locked.
    for descriptor in _held_locks:
        os.close(descriptor)
    _held_locks.clear()


os.register_at_fork(after_in_child=_close_locks_in_fork)
