"""CUDA graphs: the operations of a function, recorded once and started together from then on; and a second queue.

To start an operation on a GPU takes the host some ten microseconds; most of a small network's are done in two or three.
Started as one graph, they follow each other at the GPU's pace.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

Tensors = tuple[Tensor, ...]

_log = logging.getLogger(__name__)


def can_record(device: torch.device) -> bool:
    """Whether the device knows graphs."""
    return device.type == "cuda"


class Recorded:
    """A function of tensors, replayed as a CUDA graph whenever its arguments have the shapes they had before.

    Arguments that come before the first tensor are constants of a recording: with others it is made anew.

    The first call is an ordinary one, in which libraries set themselves up. A later one records the operations and the
    addresses that they read and write, and nothing of Python. Hence the function

    - starts operations on the GPU of its arguments, waits for none of them, and draws no random numbers there;
    - reads, beyond its arguments, tensors that stay where they are: parameters, which change in place. What an ordinary
      call has made for later ones is none of those;
    - returns tensors, which are overwritten by the next call.

    Replayed, it gives what the ordinary call gives, to the bit. One that does wait is called as usual from then on.

    Args:
        function: see above.
        first: its operations are let through before those of other graphs: for many small ones beside large ones.
        after: so many ordinary calls in a row with the same constants and shapes, at least one: to record takes longer
            than to call, and shapes may be others each time.
        on_refusal: told once why it cannot be recorded.
    """

    def __init__(
        self,
        function: Callable[..., Tensors],
        *,
        first: bool = False,
        after: int = 1,
        on_refusal: Callable[[str], None] = _log.warning,
    ):
        self.function = function
        self.first = first
        self.after = after
        self.on_refusal = on_refusal
        self._refused = False
        self._kind: list[Any] = []  # constants and shapes
        self._calls = 0  # ordinary ones of this kind
        self._replay: Callable[[], None] | None = None
        self._arguments: Tensors = ()
        self._results: Tensors = ()

    def __call__(self, *arguments: Any) -> Tensors:
        tensors = tuple(x for x in arguments if isinstance(x, Tensor))
        constants = arguments[: -len(tensors)]
        kind = [*constants, *(x.shape for x in tensors)]
        if kind != self._kind:
            self._kind, self._calls = kind, 0
            self._replay, self._arguments, self._results = None, (), ()
        if self._refused or self._calls < self.after:
            self._calls += 1
            return self.function(*arguments)
        if self._replay is None:
            self._arguments = tuple(x.clone() for x in tensors)
            try:
                function = partial(self.function, *constants)
                self._replay, self._results = record(function, self._arguments, self.first)
            except RuntimeError as error:  # nothing was run
                self._refused = True
                self.on_refusal(str(error.__context__ or error).partition("\n")[0])
                return self.function(*arguments)
        else:
            for place, x in zip(self._arguments, tensors, strict=True):
                place.copy_(x)
        self._replay()
        return self._results


def record(function: Callable[..., Tensors], arguments: Tensors, first: bool) -> tuple[Callable[[], None], Tensors]:
    """Records function(*arguments) without running it: what runs it, and where its results will be.

    Raises:
        RuntimeError: it did what cannot be recorded: it waited for the GPU, say.
    """
    graph, device = torch.cuda.CUDAGraph(), arguments[0].device
    with (
        torch.cuda.device(device),
        _own_workspace(),
        # Other threads may go on using the GPU meanwhile.
        torch.cuda.graph(graph, stream=_stream(device, first), capture_error_mode="thread_local"),
    ):
        results = function(*arguments)

    def replay() -> None:
        with torch.cuda.device(device):
            graph.replay()

    return replay, results


@lru_cache
def _stream(device: torch.device, first: bool) -> torch.cuda.Stream:
    """Where to record: what is recorded has its priority."""
    return torch.cuda.Stream(device, priority=-1 if first else 0)


@contextmanager
def _own_workspace() -> Iterator[None]:
    """Within, products of matrices are given workspaces of their own: torch has one for each stream, which graphs that
    run side by side would share, and which may go with one of them."""
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()


class SecondQueue:
    """Work for a GPU beside what is given to it as usual."""

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.Stream(device)

    @contextmanager
    def begin(self) -> Iterator[None]:
        """Operations started within run in this queue, after all that was started before."""
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            yield

    def join(self) -> None:
        """What is started from now on runs after what this queue holds. Tensors it uses have to live until then."""
        torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
