"""State ↔ disk: atomic, checksummed, and never a pickle.

A checkpoint is a directory of two files. `tensors.safetensors` holds every tensor and array; `manifest.json` holds the
rest of the state as a JSON tree, in which the tensors are named, with the format, its schema version and the size and
SHA-256 of the tensors file. The manifest begins with the SHA-256 of its own body, which is verified before anything is
parsed. Reading one gives numbers, text and containers: nothing on disk can name code to run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from trpo.errors import CheckpointError
from trpo.run.state_tree import State, decode, encode
from trpo.run.whole_file import sync_directory, write_durably

FORMAT = "trpo-checkpoint"
SCHEMA = 1
TENSORS_FILE = "tensors.safetensors"
MANIFEST_FILE = "manifest.json"

_MAX_MANIFEST_BYTES = 1 << 28
_MANIFEST = re.compile(rb'\{"sha256": "([0-9a-f]{64})", "body": (.*)\}\n', re.DOTALL)
_STEP = re.compile(r"(?:step-(\d+)|\.step-(\d+)\.old)")
_TEMPORARY = re.compile(r"\..+\.tmp-(\d{1,9})-[0-9a-f]{8}")


class NewerSchemaError(CheckpointError):
    """A checkpoint is whole, but written by a newer version: not to be passed over, nor deleted as superseded."""


def save_state(path: Path, state: State, *, replace: bool = False) -> None:
    """Writes a checkpoint so that a crash at any instant leaves either all of it or nothing at `path`.

    The files are written beside `path`, synced, and moved into place. With `replace`, the checkpoint at `path` is set
    aside first and deleted last; if a crash falls between, `load_state(path)` reads the one set aside.

    Tensors are copied to the CPU, contiguous and without their graph, so views of one shared buffer are fine. A tensor
    that occurs twice is stored twice. Subclasses of dict load as dict.

    Raises:
        TypeError: `state` holds something else than `State` allows; the message names its place in the tree.
        CheckpointError: `path` exists (and is no checkpoint, or `replace` is off), or the disk refuses: then temporary
            files are gone and what was there before is intact.
    """
    path = Path(os.path.abspath(path))
    tensors: dict[str, Tensor] = {}
    tree = encode(state, "", tensors)
    data = safetensors.torch.save(tensors)
    manifest = _manifest_bytes(tree, data)
    if len(manifest) > _MAX_MANIFEST_BYTES:
        raise CheckpointError(f"cannot save checkpoint {path}: too much text; keep long lists as arrays")
    try:
        _refuse_existing(path, replace)
        _publish(path, {TENSORS_FILE: data, MANIFEST_FILE: manifest})
    except OSError as error:
        raise CheckpointError(
            f"cannot save checkpoint {path}: {_reason(error)}; free space there or choose another directory"
        ) from error


def load_state(path: Path) -> State:
    """Reads what `save_state` wrote, exactly: types, shapes, dtypes and key order; tensors on the CPU.

    Raises:
        CheckpointError: for whatever is wrong with it: missing, truncated, altered, of a newer schema, not ours.
    """
    try:
        directory = _locate(path)
        if not directory.is_dir():
            raise ValueError("there is no such directory")
        manifest = _read_manifest(directory / MANIFEST_FILE)
        return decode(manifest["state"], _read_tensors(directory / TENSORS_FILE, manifest["tensors"]))
    except NewerSchemaError as error:
        raise NewerSchemaError(f"cannot load {path}: {error}") from error
    except Exception as error:  # a trust boundary: of hostile bytes parsers raise anything, and users see one kind
        raise CheckpointError(f"cannot load {path}: {_reason(error)}; choose another checkpoint or policy") from error


class CheckpointStore:
    """The checkpoints of one run, `directory/step-000123456`, written by one process at a time.

    Construction removes what dead processes left half written.

    Args:
        directory: created if missing.
        keep: newest checkpoints kept, at least 1.
        on_warning: gets one line for every damaged checkpoint skipped or old one that cannot be deleted.
    """

    def __init__(self, directory: Path, *, keep: int, on_warning: Callable[[str], None] = warnings.warn) -> None:
        if keep < 1:
            raise ValueError(f"keep has to be at least 1, not {keep}")
        self.directory = directory
        self.keep = keep
        self._on_warning = on_warning
        try:
            directory.mkdir(parents=True, exist_ok=True)
            remove_stale(directory)
        except OSError as error:
            raise CheckpointError(f"cannot use {directory} for checkpoints: {_reason(error)}") from error

    def save(self, state: State, *, env_steps: int) -> Path:
        """Saves, replacing a checkpoint of the same step; only when that is durable, deletes the superseded ones.

        Superseded are all but the `keep` newest, and those of more steps than this one: a run that was resumed from an
        older checkpoint has left that future, and `newest` must not return to it.

        Raises:
            CheckpointError, TypeError: as `save_state`; nothing was deleted.
        """
        path = self.directory / f"step-{env_steps:09d}"
        save_state(path, state, replace=True)
        self._prune(env_steps)
        return path

    def _prune(self, env_steps: int) -> None:
        paths = checkpoint_paths(self.directory)
        kept = [path for path in paths if _step_of(path) <= env_steps][: self.keep]
        for old in reversed(paths):
            if old not in kept:
                try:
                    _discard(_aside(old))
                    _discard(old)
                except OSError as error:
                    self._on_warning(f"cannot delete the old checkpoint {old}: {_reason(error)}")

    def newest(self) -> tuple[Path, State] | None:
        """As `newest_checkpoint` of this directory."""
        return newest_checkpoint(self.directory, on_warning=self._on_warning)


def newest_checkpoint(
    directory: Path, *, on_warning: Callable[[str], None] = warnings.warn
) -> tuple[Path, State] | None:
    """The newest valid checkpoint under `directory` and its state; None without one. Changes nothing on disk.

    Damaged checkpoints are passed over, with a line to `on_warning` for each.

    Raises:
        NewerSchemaError: going on from an older checkpoint would leave, and in time delete, what a newer version saved.
    """
    for path in checkpoint_paths(directory):
        try:
            return path, load_state(path)
        except NewerSchemaError:
            raise
        except CheckpointError as error:
            on_warning(f"skipped a damaged checkpoint: {error}")
    return None


def checkpoint_paths(directory: Path) -> list[Path]:
    """Paths `directory/step-…`, most steps first, valid or not; empty where there is no such directory.

    Raises:
        CheckpointError: the directory cannot be read.
    """
    try:
        names = os.listdir(directory)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise CheckpointError(f"cannot look for checkpoints in {directory}: {_reason(error)}") from error
    matches = [match for name in names if (match := _STEP.fullmatch(name))]
    paths = {directory / f"step-{match[1] or match[2]}" for match in matches}
    return sorted(paths, key=_step_of, reverse=True)


def remove_stale(directory: Path) -> None:
    """Removes what saves under `directory` left half written when their process died.

    To be called by a process that saves nothing there at that moment: its own number counts as a dead one's, because
    numbers recur (in a container, the trainer often has the same one every time).
    """
    for name in os.listdir(directory):
        match = _TEMPORARY.fullmatch(name)
        if match and not _is_another_process(int(match[1])):
            shutil.rmtree(directory / name, ignore_errors=True)


def _manifest_bytes(tree: Any, data: bytes) -> bytes:
    tensors = {"file": TENSORS_FILE, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    content = {"format": FORMAT, "schema": SCHEMA, "tensors": tensors, "state": tree}
    body = json.dumps(content, ensure_ascii=False, allow_nan=False).encode()
    return b'{"sha256": "%b", "body": %b}\n' % (hashlib.sha256(body).hexdigest().encode(), body)


def _read_manifest(file: Path) -> dict[str, Any]:
    match = _MANIFEST.fullmatch(_read(file, _MAX_MANIFEST_BYTES))
    if not match:
        raise ValueError(f"{file.name} is truncated or no checkpoint's")
    if hashlib.sha256(match[2]).hexdigest().encode() != match[1]:
        raise ValueError(f"{file.name} does not match its checksum")
    body = json.loads(match[2])
    if type(body) is not dict or body.get("format") != FORMAT or type(body.get("schema")) is not int:
        raise ValueError(f"{file.name} is no checkpoint's")
    if body["schema"] > SCHEMA:
        raise NewerSchemaError(
            f"its schema {body['schema']} is newer than {SCHEMA}, the newest known here: update trpo"
        )
    return body


def _read_tensors(file: Path, listed: dict[str, Any]) -> dict[str, Tensor]:
    data = _read(file, listed["size"])
    if len(data) != listed["size"]:
        raise ValueError(f"{file.name} has {len(data)} bytes instead of {listed['size']}")
    if hashlib.sha256(data).hexdigest() != listed["sha256"]:
        raise ValueError(f"{file.name} does not match its checksum")
    return safetensors.torch.load(data)


def _read(file: Path, limit: int) -> bytes:
    if not file.is_file():  # a pipe would block, a device never end
        raise ValueError(f"{file.name} is missing")
    if file.stat().st_size > limit:
        raise ValueError(f"{file.name} has more than {limit} bytes")
    return file.read_bytes()


def _publish(path: Path, files: dict[str, bytes]) -> None:
    """Makes the directory `path` of `files` appear at once, in place of the one that may be there. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_beside(path)
    aside = _aside(path)
    try:
        temporary.mkdir()
        for name, content in files.items():
            write_durably(temporary / name, content)
        sync_directory(temporary)
        if path.exists():
            _discard(aside)
            os.rename(path, aside)
        os.rename(temporary, path)
        sync_directory(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    with contextlib.suppress(OSError):  # the new one is durable; while it exists, the old one is never looked at
        _discard(aside)


def _refuse_existing(path: Path, replace: bool) -> None:
    """Overwriting needs `replace`, and never deletes a directory that holds anything but a checkpoint's files."""
    if not replace and os.path.lexists(_locate(path)):
        raise CheckpointError(f"checkpoint {path} exists already; choose another path or delete it")
    if os.path.lexists(path):
        is_checkpoint = path.is_dir() and not path.is_symlink() and {*os.listdir(path)} <= {TENSORS_FILE, MANIFEST_FILE}
        if not is_checkpoint:
            raise CheckpointError(f"{path} exists and is not a checkpoint; choose another path")


def _locate(path: Path) -> Path:
    """`path`, or the checkpoint set aside while `path` was being replaced, if that was cut short."""
    path = Path(os.path.abspath(path))
    aside = _aside(path)
    if os.path.lexists(path) or not aside.is_dir():
        return path
    return path if os.path.lexists(path) else aside  # asked again: a live writer may have finished in between


def _discard(path: Path) -> None:
    """Deletes a checkpoint if it is there, under another name, so that half of one is never taken for one."""
    if path.exists():
        doomed = _temporary_beside(path)
        os.rename(path, doomed)
        shutil.rmtree(doomed)


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _temporary_beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _is_another_process(pid: int) -> bool:
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _reason(error: BaseException) -> str:
    """What went wrong, in one short line."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    if isinstance(error, KeyError):
        text = f"it lacks {text}"
    return " ".join((text or type(error).__name__).split())[:200]
