"""A pretended GPU: numbers in host memory, in tensors that say they lie elsewhere.

It refuses what a real one refuses, above all operations on tensors of two devices, and counts what the host has to wait
for. What it computes is what the CPU computes. Torch lets such a device be written in Python, but for a whole process
and for good: only for processes of their own (`on_pretended_gpu.py`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from helpers import no_graph
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("pretended")
DEVICE = torch.device("pretended", 0)

# What tells Python a value, or needs one for the shape of its result.
_LOOKS = ("aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero", "aten::masked_select", "aten::nonzero")
_INDEXING = ("aten::index.Tensor", "aten::index_put", "aten::index_put_")

waits: list[str] = []  # what the host has waited for, in order


class OnDevice(torch.Tensor):
    """Stands for `inner`, which nobody else has."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> OnDevice:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})

    # What torch does to a tensor's memory without asking the device.

    @property
    def data(self) -> torch.Tensor:
        return torch.Tensor.data.__get__(self)  # type: ignore[attr-defined]

    @data.setter
    def data(self, value: OnDevice) -> None:
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.inner = value.inner

    def tolist(self) -> Any:
        waits.append("tolist")
        return self.inner.tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        if id(self) not in memo:
            copy = OnDevice(self.inner.clone())
            memo[id(self)] = nn.Parameter(copy, self.requires_grad) if isinstance(self, nn.Parameter) else copy
        return memo[id(self)]

    def __repr__(self) -> str:
        return f"OnDevice({self.inner!r})"


def _inner(x: Any) -> Any:
    if isinstance(x, OnDevice):
        return x.inner
    return torch.device("cpu") if isinstance(x, torch.device) else x


def _placed(x: Any) -> Any:
    return OnDevice(x) if isinstance(x, torch.Tensor) else x


def _run(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name = function.name()
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    there = [x for x in tensors if isinstance(x, OnDevice)]
    here = [x for x in tensors if not isinstance(x, OnDevice)]
    goes_there = kwargs["device"].type == DEVICE.type if kwargs.get("device") is not None else bool(there)
    inner_args, inner_kwargs = tree_map(_inner, (args, kwargs))
    if name == "aten::copy_":
        if here:
            waits.append("a copy")
        function(*inner_args, **inner_kwargs)
        return args[0]
    if name == "aten::_to_copy":
        if goes_there != bool(there):
            waits.append("a copy")
        out = function(*inner_args, **inner_kwargs)
        return OnDevice(out.clone() if out is inner_args[0] else out) if goes_there else out
    if there:
        indices = args[1] if name in _INDEXING else ()
        if any(x.dim() for x in here if not any(x is index for index in indices)):
            raise RuntimeError(f"{name}: tensors on {DEVICE} and on the CPU")
        masked = any(x is not None and x.dtype is torch.bool for x in indices)
        if name in _LOOKS or masked or any(index is x for index in indices for x in here):
            waits.append(name)
    out = function(*inner_args, **inner_kwargs)
    if not goes_there:
        return out
    known = {id(x.inner): x for x in there}  # what was changed in place
    return tree_map(lambda x: known[id(x)] if id(x) in known else _placed(x), out)


_library = torch.library.Library("_", "IMPL")
_library.fallback(lambda function, *args, **kwargs: _run(function, args, kwargs), "PrivateUse1")


class _Made(TorchFunctionMode):
    """Tensors made of Python's numbers, which torch puts on a device where no fallback is asked."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function is torch.tensor and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            return function(*args, **kwargs).to(device)
        return function(*args, **kwargs)


@contextlib.contextmanager
def pretended_gpu() -> Iterator[None]:
    """Within, tensors may be made on `DEVICE`."""
    # A view of a tensor made outside would be one of inference inside, which these cannot be.
    with _Made(), mock.patch.object(torch, "inference_mode", no_graph):
        yield
