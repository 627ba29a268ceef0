"""Pretended CUDA graphs, on the CPU: operations with the tensors they read and write, and nothing of Python.

As with real ones, nothing runs while it is recorded, what would have to be waited for is refused, and a replay writes
to the tensors of the recording. Unlike real ones they notice when they have gone stale: before each replay the function
is recorded again, and has to do the same operations on the same numbers and the same memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from helpers import no_graph
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import trpo.agent
import trpo.envs.torch_native
import trpo.runtime.cuda_graph
import trpo.value.adam

_REFUSED = {
    torch.Tag.data_dependent_output,  # what tells Python a value
    torch.Tag.dynamic_output_shape,  # or needs one for the shape of its result
    torch.Tag.nondeterministic_seeded,
}


class Recording(TorchDispatchMode):
    """Within, operations are recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []
        self.signature: list[tuple[str, ...]] = []  # what each does, on which numbers and which memory
        self._made: dict[int, int] = {}  # storages of results, by their order
        self._before: dict[int, tuple[Tensor, Tensor]] = {}  # of storages written to: a tensor of each, and its values
        self._kept: list[Tensor] = []  # so that no address is used again

    def __enter__(self) -> Recording:
        self._looks = mock.patch.object(torch.Tensor, "tolist", _refuse("tolist"))
        self._looks.start()
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._looks.stop()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = tree_leaves((args, kwargs))
        masks = function.name().startswith("aten::index") and any(
            isinstance(x, Tensor) and x.dtype is torch.bool for x in tree_leaves(args[1])
        )
        if masks or _REFUSED & set(function.tags):
            _refuse(function.name())()
        self.signature.append((function.name(), *map(self._named, given)))
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
            for x in tensors:
                self._made.setdefault(_address(x), len(self._made))
        self.operations.append((function, args, kwargs, result))
        return result

    def _named(self, x: Any) -> str:
        if not isinstance(x, Tensor):
            return repr(x)
        made = self._made.get(_address(x))
        place = f"at {_address(x):x}" if made is None else f"result {made}"
        return f"{place} + {x.storage_offset()} {tuple(x.shape)} {x.stride()}"

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


def _refuse(name: str) -> Callable[..., Any]:
    def refuse(*_: Any) -> Any:
        raise RuntimeError(f"{name}: operation not permitted when stream is capturing")

    return refuse


def _recorded(function: Callable[..., Any], arguments: tuple[Tensor, ...]) -> tuple[Recording, Any]:
    recording = Recording()
    try:
        with recording:
            return recording, function(*arguments)
    finally:
        recording.undo()


def record(function: Callable[..., Any], arguments: tuple[Tensor, ...], first: bool) -> tuple[Callable[[], None], Any]:
    """`trpo.runtime.cuda_graph.record`, pretended."""
    recording, results = _recorded(function, arguments)

    @torch.no_grad()
    def replay() -> None:
        now, _ = _recorded(function, arguments)
        for was, is_ in zip(recording.signature, now.signature, strict=True):
            assert was == is_, "what was recorded is no longer what the function does"
        recording.replay()

    return replay, results


def pretend(patch: pytest.MonkeyPatch, *, recorded: bool = True) -> list[int]:
    """From now on the CPU knows graphs, and each that is recorded is counted. If not `recorded`, functions that would
    be are called."""
    count: list[int] = []

    def counted(*args: Any) -> Any:
        count.append(1)
        return record(*args)

    for module in (trpo.agent, trpo.envs.torch_native, trpo.value.adam):
        patch.setattr(module, "can_record", lambda device: True)
    patch.setattr(trpo.runtime.cuda_graph, "record", counted)
    # Tensors of inference could not be written to from outside, as nobody but these here does.
    patch.setattr(torch, "inference_mode", no_graph)
    if not recorded:
        only_call(patch)
    return count


def only_call(patch: pytest.MonkeyPatch) -> None:
    """From now on nothing is recorded, neither on a real GPU."""
    patch.setattr(trpo.runtime.cuda_graph.Recorded, "__call__", lambda self, *arguments: self.function(*arguments))
