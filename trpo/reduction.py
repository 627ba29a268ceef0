"""The one hook through which mathematics meets many processes: a sum over all of them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

AllSum = Callable[[Tensor], Tensor]  # t ↦ Σ over processes, same shape and dtype; may work in place


def one_process(tensor: Tensor) -> Tensor:
    """The sum over a single process."""
    return tensor
