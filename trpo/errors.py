"""Errors a user can act on, and the words they are put in."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import os
import re
import sysconfig
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


class UserError(Exception):
    """A mistake in input (argument, config, file, environment) with one line that says what to change."""


class ConfigError(UserError):
    """A setting is unknown, of the wrong type, out of range or contradicts another."""


class EnvError(UserError):
    """An environment cannot be built, is not supported, or broke its contract while stepping."""


class CheckpointError(UserError):
    """A checkpoint or saved policy is missing, damaged, or does not fit."""


class TrainingError(UserError):
    """Training cannot go on; what was saved stays good."""


def did_you_mean(candidates: Iterable[object]) -> str:
    """The end of an error line; empty without candidates."""
    text = " or ".join(map(str, candidates))
    return f"; did you mean {text}?" if text else ""


def nearest_path(missing: Path, others: Iterable[Path]) -> str:
    """`did_you_mean` that path among the others whose name is most like the missing one's, if any is."""

    def name(path: Path) -> str:
        return path.name.removesuffix(".yaml")  # which would make any two alike

    by_name = {name(path): path for path in others}
    return did_you_mean(by_name[near] for near in difflib.get_close_matches(name(missing), by_name, n=1))


def raised(error: BaseException) -> str:
    """What other people's code raised, and where: one line, since whoever wrote it can open the file."""
    frames = traceback.extract_tb(error.__traceback__)
    place = ([frame for frame in frames if not _is_installed(frame.filename)] or frames)[-1]
    file = place.filename
    with contextlib.suppress(OSError):  # the working directory may be gone
        file = os.path.relpath(file)
    return f"{type(error).__name__}: {' '.join(str(error).split())} ({file}:{place.lineno})"


def _is_installed(file: str) -> bool:
    """Whether it is Python's, a package's or this one's, and so not the place where a user would look."""
    theirs = (*(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")), os.path.dirname(__file__))
    return file.startswith((*(os.path.join(folder, "") for folder in theirs), "<frozen "))


def imported(name: str, *, key: str, kind: type[UserError]) -> Any:
    """What a setting `key` names as `module:attribute`; raises `kind`, in one line, if that cannot be imported."""
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise kind(f"{key}: {name!r} cannot be imported: {error}") from error
    except (Exception, SystemExit) as error:  # of modules that give up with `sys.exit`
        raise kind(f"{key}: {name!r} cannot be imported: {raised(error)}") from error


@contextlib.contextmanager
def memory_needed() -> Iterator[None]:
    """Within, a block of memory that cannot be had is a `UserError`."""
    try:
        yield
    except (MemoryError, OverflowError, RuntimeError, TypeError) as error:
        if isinstance(error, RuntimeError | TypeError) and not re.search("allocate|[Oo]verflow", str(error)):
            raise
        smaller = "make hidden_sizes, policy.bins, env.num_envs or batch_size smaller"
        raise UserError(f"what is trained does not fit into memory ({gist(error)}): {smaller}") from error


def gist(error: Exception) -> str:
    """The first line that says something: torch's own begins with a heading, and a key's name alone says nothing."""
    if isinstance(error, KeyError):
        return f"it has no {error}"
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line[:200] for line in lines if line and not line.endswith(":")), type(error).__name__)
