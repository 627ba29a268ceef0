"""Pretended CUDA graphs, on the CPU: operations with the tensors they read and write, and nothing of Python.

As with real ones, nothing runs while it is recorded, what would have to be waited for is refused, and a replay writes
to the tensors of the recording.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import trpo.agent
import trpo.cuda_graph
import trpo.envs.torch_native
import trpo.value

_LOOKS = ("aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero", "aten::masked_select", "aten::nonzero")
_DRAWS = ("aten::normal_", "aten::uniform_", "aten::random_", "aten::randperm", "aten::randn", "aten::rand")


class Recording(TorchDispatchMode):
    """Within, operations are recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []
        self._made: set[int] = set()  # storages of results
        self._before: dict[int, tuple[Tensor, Tensor]] = {}  # of storages written to: a tensor of each, and its values
        self._kept: list[Tensor] = []  # so that no address is used again

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function.name().partition(".")[0]
        if name in _LOOKS or name in _DRAWS:
            raise RuntimeError(f"{name}: operation not permitted when stream is capturing")
        for argument, value in zip(function._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for x in tree_leaves(value):
                    self._save(x)
        if "out" in kwargs:
            self._save(kwargs["out"])
        result = function(*args, **kwargs)
        tensors = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        self._kept += tensors
        if not any(returned.alias_info is not None for returned in function._schema.returns):
            self._made |= {_address(x) for x in tensors}
        self.operations.append((function, args, kwargs, result))
        return result

    def _save(self, x: Tensor) -> None:
        if _address(x) not in self._made and _address(x) not in self._before:
            whole = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
            self._before[_address(x)] = (whole, whole.clone())

    def undo(self) -> None:
        """What was written is as it was before."""
        for whole, before in self._before.values():
            whole.copy_(before)

    def replay(self) -> None:
        for function, args, kwargs, result in self.operations:
            again = function(*args, **kwargs)
            if any(returned.alias_info is not None for returned in function._schema.returns):
                continue  # a view, or what was written in place: it is there already
            for place, x in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(place, Tensor):
                    place.copy_(x)


def _address(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def record(function: Callable[..., Any], arguments: tuple[Tensor, ...], first: bool) -> tuple[Callable[[], None], Any]:
    """`trpo.cuda_graph.record`, pretended."""
    recording = Recording()
    try:
        with recording:
            results = function(*arguments)
    finally:
        recording.undo()

    return torch.no_grad()(recording.replay), results


def pretend(patch: pytest.MonkeyPatch, *, recorded: bool = True) -> list[int]:
    """From now on the CPU knows graphs, and each that is recorded is counted. If not `recorded`, functions that would
    be are called."""
    count: list[int] = []

    def counted(*args: Any) -> Any:
        count.append(1)
        return record(*args)

    for module in (trpo.agent, trpo.envs.torch_native, trpo.value):
        patch.setattr(module, "can_record", lambda device: True)
    patch.setattr(trpo.cuda_graph, "record", counted)
    # Tensors of inference could not be written to from outside, as nobody but these here does.
    without = lambda mode=True: torch.no_grad() if mode else contextlib.nullcontext()  # noqa: E731
    patch.setattr(torch, "inference_mode", without)
    if not recorded:
        patch.setattr(trpo.cuda_graph.Recorded, "__call__", lambda self, *arguments: self.function(*arguments))
    return count
