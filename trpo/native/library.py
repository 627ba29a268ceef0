"""The compiled functions, the threads they have, and what tensors they may be given."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

SWITCHED_OFF = os.environ.get("TRPO_NATIVE") == "0"
VERSION = 6  # of the functions in mlp.c, and of their arguments
BLOCK = 128  # rows that mlp.c takes through all layers at a time
MOST_THREADS = 8

_is_transformed = torch._C._functorch.is_functorch_wrapped_tensor
NUMBERS, INT, LONG = ctypes.c_void_p, ctypes.c_int, ctypes.c_long
FLOAT, DOUBLE = ctypes.c_float, ctypes.c_double
_NETWORK = [ctypes.POINTER(LONG), INT]
_SIGNATURES: dict[str, tuple[type | None, list]] = {
    "mlp_workspace": (LONG, [*_NETWORK, LONG]),
    "mlp_padded": (LONG, [LONG]),
    "mlp_passing": (LONG, [LONG]),
    "mlp_forward": (None, [*_NETWORK, INT, NUMBERS, NUMBERS, LONG, INT, NUMBERS, NUMBERS, INT]),
    "mlp_freeze": (None, [*_NETWORK, NUMBERS, NUMBERS]),
    "mlp_jvp": (None, [*_NETWORK, INT, NUMBERS, LONG, NUMBERS, NUMBERS, INT]),
    "mlp_vjp": (None, [*_NETWORK, INT, NUMBERS, LONG, NUMBERS, NUMBERS, INT]),
    "mlp_factors": (None, [*_NETWORK, INT, NUMBERS, LONG, NUMBERS, NUMBERS]),
    "mlp_adam": (None, [*_NETWORK, INT, *[NUMBERS] * 6, INT, *[NUMBERS] * 3, FLOAT, FLOAT, NUMBERS]),
    "ordinal_log_probabilities": (None, [LONG, LONG, LONG, *[NUMBERS] * 3, INT]),
    "ordinal_metric": (None, [LONG, LONG, LONG, *[NUMBERS] * 4, INT]),
    "ordinal_sample": (None, [LONG, LONG, LONG, *[NUMBERS] * 6, INT]),
    "policy_act": (None, [NUMBERS, LONG, INT]),
    "carried_sums_float": (None, [LONG, LONG, NUMBERS, NUMBERS, INT]),
    "carried_sums_double": (None, [LONG, LONG, NUMBERS, NUMBERS, INT]),
    "adam_step": (None, [LONG, NUMBERS, NUMBERS, NUMBERS, NUMBERS, FLOAT, FLOAT, FLOAT, FLOAT]),
}


def _built() -> str | None:
    """The file that the installation compiled, if it did."""
    spec = importlib.util.find_spec("trpo.native._mlp")
    return None if spec is None or SWITCHED_OFF else spec.origin


def load(file: str | None) -> Any:
    """The compiled functions of a file; None if there is none, or it is of another version or processor."""
    if file is None:
        return None
    try:
        library = ctypes.CDLL(file)
        if library.mlp_version() != VERSION or not library.mlp_runs_here():
            return None
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError):
        return None
    return library


LIBRARY: Any = load(_built())  # by this name, since tests put others in its place


def available() -> bool:
    """Whether the compiled functions are there and run on this processor."""
    return LIBRARY is not None


_spare = 0
_spare_lock = threading.Lock()


@contextlib.contextmanager
def spare_threads(count: int) -> Iterator[Callable[[], None]]:
    """Gives the compiled functions so many threads more than torch has, or fewer: inside, or until what this yields is
    called, from any thread."""
    pending = [count, -count]

    def next_change() -> None:
        global _spare
        with _spare_lock:
            _spare += pending.pop(0) if pending else 0

    try:
        next_change()
        yield next_change
    finally:
        next_change()


def threads() -> int:
    return min(max(1, torch.get_num_threads() + _spare), MOST_THREADS)


def takes(x: Tensor) -> bool:
    """Whether the compiled functions may work on x [B, …]: of a kind they know, no graph wanted."""
    return wanted() and plain(x)


def wanted() -> bool:
    """Whether nobody looks at the operations themselves, to differentiate, compile or export them."""
    return (
        LIBRARY is not None
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined]
    )


def plain(x: Tensor, dtype: torch.dtype = torch.float32) -> bool:
    """Numbers in host memory, which no subclass or transformation of `torch.func` stands for."""
    return x.dtype is dtype and x.is_cpu and type(x) in (Tensor, nn.Parameter) and not _is_transformed(x)


def checked(x: Tensor, shape: Sequence[int], name: str) -> Tensor:
    """x row after row in memory; ValueError unless it is plain and of this shape."""
    if x.shape != torch.Size(shape) or not plain(x):
        raise ValueError(f"{name} is {x.dtype} {list(x.shape)} on {x.device}, not float32 {list(shape)} on the CPU")
    return x.contiguous()


def addresses(tensors: Sequence[Tensor]) -> Any:
    """Where they lie, as C takes it."""
    return (NUMBERS * len(tensors))(*[tensor.data_ptr() for tensor in tensors])
