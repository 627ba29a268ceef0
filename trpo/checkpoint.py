"""State ↔ disk: atomic, checksummed, and never a pickle.

A checkpoint is a directory of two files. `tensors.safetensors` holds every tensor and array; `manifest.json` holds the
rest of the state as a JSON tree, in which the tensors are named, with the format, its schema version and the size and
SHA-256 of the tensors file. The manifest begins with the SHA-256 of its own body, which is verified before anything is
parsed. Reading one gives numbers, text and containers: nothing on disk can name code to run.

In the tree, objects with a key of one `$` stand for what JSON lacks; a `$` that begins a key of the state is doubled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from trpo.errors import CheckpointError

# A nested dict (str keys) | list | tuple of Tensor | np.ndarray | np.generic | str | int | float | bool | None. Checked
# when saved: as a static type, the invariance of dict would refuse every caller's `dict[str, Tensor]`.
State: TypeAlias = Any

FORMAT = "trpo-checkpoint"
SCHEMA = 1
TENSORS_FILE = "tensors.safetensors"
MANIFEST_FILE = "manifest.json"

_MAX_DEPTH = 100  # well below what the JSON parser can recurse
_MAX_MANIFEST_BYTES = 1 << 28
_EXACT_JSON_INT = 1 << 53  # other JSON readers hold integers as float64
_MANIFEST = re.compile(rb'\{"sha256": "([0-9a-f]{64})", "body": (.*)\}\n', re.DOTALL)
_STEP = re.compile(r"(?:step-(\d+)|\.step-(\d+)\.old)")
_TEMPORARY = re.compile(r"\..+\.tmp-(\d{1,9})-[0-9a-f]{8}")
_UNSIGNED, _SIGNED = {"uint8", "uint16", "uint32", "uint64"}, {"int8", "int16", "int32", "int64"}
_NUMPY_NATIVE = _UNSIGNED | _SIGNED | {"bool", "float16", "float32", "float64", "complex64"}
_TORCH_NATIVE = {getattr(torch, name) for name in (*_NUMPY_NATIVE, "bfloat16")}


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
    tree = _encode(state, "", tensors)
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
        return _decode(manifest["state"], _read_tensors(directory / TENSORS_FILE, manifest["tensors"]))
    except NewerSchemaError as error:
        raise NewerSchemaError(f"cannot load checkpoint {path}: {error}") from error
    except (
        Exception
    ) as error:  # a trust boundary: parsers fed with hostile bytes raise anything, and users see one kind
        raise CheckpointError(f"cannot load checkpoint {path}: {_reason(error)}; choose another checkpoint") from error


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


def write_durably(path: Path, content: bytes) -> None:
    """Writes a new file and waits until it is on the disk. Raises OSError, FileExistsError among them."""
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Waits until the entries of a directory (new and renamed files) are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _encode(value: State, where: str, tensors: dict[str, Tensor]) -> Any:
    """The JSON form of `value`; its tensors go to `tensors`, named by `where`, the JSON pointer (RFC 6901) to them."""
    if where.count("/") > _MAX_DEPTH:
        raise TypeError(f"state{where[:80]}…: nested deeper than {_MAX_DEPTH} levels, or within itself")
    if value is None or type(value) is bool:
        return value
    if type(value) is str:
        return _text(value, where)
    if type(value) is int:
        return value if abs(value) <= _EXACT_JSON_INT else {"$int": hex(value)}
    if type(value) is float:
        return value if math.isfinite(value) else {"$float": struct.pack(">d", value).hex()}
    if isinstance(value, dict):
        return {_encode_key(key, where): _encode(item, _child(where, key), tensors) for key, item in value.items()}
    if type(value) in (list, tuple):
        items = [_encode(item, f"{where}/{index}", tensors) for index, item in enumerate(value)]
        return items if type(value) is list else {"$tuple": items}
    if isinstance(value, Tensor):
        return _encode_tensor(value, where, tensors)
    if type(value) is np.ndarray or isinstance(value, np.generic):
        kind = "$scalar" if isinstance(value, np.generic) else "$array"
        return _encode_array(kind, np.array(value, order="C"), where, tensors)
    raise TypeError(f"state{where}: {type(value).__name__} cannot be saved; use tensors, arrays, numbers and text")


def _encode_tensor(value: Tensor, where: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    if value.layout is not torch.strided or value.is_meta:
        raise TypeError(f"state{where}: a tensor that is sparse or has no data cannot be saved")
    copy = value.detach().cpu().clone(memory_format=torch.contiguous_format)
    if copy.dtype == torch.complex128:
        return _encode_array("$tensor", copy.numpy(), where, tensors)
    if copy.dtype not in _TORCH_NATIVE:
        raise TypeError(f"state{where}: a tensor of {copy.dtype} cannot be saved")
    tensors[where] = copy
    return {"$tensor": where}


def _encode_array(kind: str, array: np.ndarray, where: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Stores a C-contiguous array; as bytes where safetensors lacks its dtype (complex128, foreign byte order)."""
    dtype = array.dtype
    if dtype.kind not in "biufc" or dtype.char in "gG":  # long double: its layout differs between machines
        raise TypeError(f"state{where}: an array of {dtype} cannot be saved")
    if dtype.isnative and dtype.name in _NUMPY_NATIVE:
        tensors[where] = torch.from_numpy(array)
        return {kind: where}
    tensors[where] = torch.from_numpy(array.reshape(-1).view(np.uint8))
    return {kind: where, "dtype": dtype.str, "shape": list(array.shape)}


def _decode(node: Any, tensors: dict[str, Tensor]) -> State:
    """The inverse of `_encode`. Each tensor can be named once, so that no two places share memory."""
    match node:
        case list():
            return [_decode(item, tensors) for item in node]
        case {"$tuple": list(items)}:
            return tuple(_decode(item, tensors) for item in items)
        case {"$int": str(text)}:
            return int(text, 16)
        case {"$float": str(bits)}:
            return struct.unpack(">d", bytes.fromhex(bits))[0]
        case {"$tensor": str(name)}:
            return torch.from_numpy(_decode_raw(node, tensors.pop(name))) if "dtype" in node else tensors.pop(name)
        case {"$array": str(name)}:
            return _decode_raw(node, tensors.pop(name))
        case {"$scalar": str(name)}:
            return _decode_raw(node, tensors.pop(name)).reshape(())[()]
        case dict():
            return {_decode_key(key): _decode(item, tensors) for key, item in node.items()}
    return node


def _decode_raw(node: dict[str, Any], stored: Tensor) -> np.ndarray:
    if "dtype" not in node:
        return stored.numpy()
    if not re.fullmatch(r"[<>|][biufc]\d+", node["dtype"]):
        raise ValueError("an array has a dtype that is not a number's")
    array: np.ndarray = stored.numpy().view(np.dtype(node["dtype"]))
    return array.reshape(node["shape"])


def _encode_key(key: Any, where: str) -> str:
    if type(key) is not str:
        raise TypeError(f"state{where}: the key {key!r} is not a str")
    return "$" * key.startswith("$") + _text(key, where)


def _decode_key(key: str) -> str:
    if key.startswith("$") and not key.startswith("$$"):
        raise ValueError(f"{MANIFEST_FILE} holds a value of the unknown kind {key[:20]!r}")
    return key.removeprefix("$")


def _child(where: str, key: str) -> str:
    return f"{where}/{key.replace('~', '~0').replace('/', '~1')}"


def _text(text: str, where: str) -> str:
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise TypeError(f"state{where}: {text[:40]!a} is not valid Unicode and cannot be saved")
    return text


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
