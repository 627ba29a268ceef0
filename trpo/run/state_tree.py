"""State as a JSON tree and named tensors, exact both ways.

Objects with a key of one `$` stand for what JSON lacks; a `$` that begins a key of the state is doubled.
"""

from __future__ import annotations

import math
import re
import struct
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

# A nested dict (str keys) | list | tuple of Tensor | np.ndarray | np.generic | str | int | float | bool | None. Checked
# when saved: as a static type, the invariance of dict would refuse every caller's `dict[str, Tensor]`.
State: TypeAlias = Any

_MAX_DEPTH = 100  # well below what the JSON parser can recurse
_EXACT_JSON_INT = 1 << 53  # other JSON readers hold integers as float64
_UNSIGNED, _SIGNED = {"uint8", "uint16", "uint32", "uint64"}, {"int8", "int16", "int32", "int64"}
_NUMPY_NATIVE = _UNSIGNED | _SIGNED | {"bool", "float16", "float32", "float64", "complex64"}
_TORCH_NATIVE = {getattr(torch, name) for name in (*_NUMPY_NATIVE, "bfloat16")}


def encode(value: State, where: str, tensors: dict[str, Tensor]) -> Any:
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
        return {_encode_key(key, where): encode(item, _child(where, key), tensors) for key, item in value.items()}
    if type(value) in (list, tuple):
        items = [encode(item, f"{where}/{index}", tensors) for index, item in enumerate(value)]
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


def decode(node: Any, tensors: dict[str, Tensor]) -> State:
    """The inverse of `encode`. Each tensor can be named once, so that no two places share memory."""
    match node:
        case list():
            return [decode(item, tensors) for item in node]
        case {"$tuple": list(items)}:
            return tuple(decode(item, tensors) for item in items)
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
            return {_decode_key(key): decode(item, tensors) for key, item in node.items()}
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
        raise ValueError(f"the state holds a value of the unknown kind {key[:20]!r}")
    return key.removeprefix("$")


def _child(where: str, key: str) -> str:
    return f"{where}/{key.replace('~', '~0').replace('/', '~1')}"


def _text(text: str, where: str) -> str:
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise TypeError(f"state{where}: {text[:40]!a} is not valid Unicode and cannot be saved")
    return text
