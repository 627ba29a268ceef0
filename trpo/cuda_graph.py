"""CUDA graphs: the operations of a function, recorded once and started together from then on; and a second queue.

To start an operation on a GPU takes the host some ten microseconds; most of a small network's are done in two or three.
Started as one graph, they follow each other at the GPU's pace.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

Tensors = tuple[Tensor, ...]

_log = logging.getLogger(__name__)


def can_record(device: torch.device) -> bool:
    """Whether the device knows graphs."""
    return device.type == "cuda"


class Recorded:
    """A function of tensors, replayed as a CUDA graph whenever its arguments have the shapes they had before.

    The first call is an ordinary one, in which libraries set themselves up. The second records the operations and the
    addresses that they read and write, and nothing of Python. Hence the function

    - starts operations on the GPU of its arguments, waits for none of them, and draws no random numbers there;
    - reads, beyond its arguments, tensors that stay where they are: parameters, which change in place;
    - returns tensors, which are overwritten by the next call.

    Replayed, it gives what the ordinary call gives, to the bit. One that does wait is called as usual from then on.

    Args:
        function: see above.
        first: its operations are let through before those of other graphs: for many small ones beside large ones.
        on_refusal: told once why it cannot be recorded.
    """

    def __init__(
        self,
        function: Callable[..., Tensors],
        *,
        first: bool = False,
        on_refusal: Callable[[str], None] = _log.warning,
    ):
        self.function = function
        self.first = first
        self.on_refusal = on_refusal
        self._refused = False
        self._shapes: list[torch.Size] | None = None
        self._replay: Callable[[], None] | None = None
        self._arguments: Tensors = ()
        self._results: Tensors = ()

    def __call__(self, *arguments: Tensor) -> Tensors:
        shapes = [x.shape for x in arguments]
        if self._refused or shapes != self._shapes:
            self._shapes, self._replay, self._results = shapes, None, ()
            return self.function(*arguments)
        if self._replay is None:
            self._arguments = tuple(x.clone() for x in arguments)
            try:
                self._replay, self._results = record(self.function, self._arguments, self.first)
            except RuntimeError as error:  # nothing was run
                self._refused = True
                self.on_refusal(str(error.__context__ or error).partition("\n")[0])
                return self.function(*arguments)
        else:
            for place, x in zip(self._arguments, arguments, strict=True):
                place.copy_(x)
        self._replay()
        return self._results


def record(function: Callable[..., Tensors], arguments: Tensors, first: bool) -> tuple[Callable[[], None], Tensors]:
    """Records function(*arguments) without running it: what runs it, and where its results will be.

    Raises:
        RuntimeError: it did what cannot be recorded: it waited for the GPU, say.
    """
    graph, device = torch.cuda.CUDAGraph(), arguments[0].device
    # Recorded in a stream of its own, since products of matrices have a workspace for each stream: graphs that run side
    # by side would share one. Other threads may go on using the GPU meanwhile.
    stream = torch.cuda.Stream(device, priority=-1 if first else 0)
    with torch.cuda.device(device), torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        results = function(*arguments)

    def replay() -> None:
        with torch.cuda.device(device):
            graph.replay()

    return replay, results


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
