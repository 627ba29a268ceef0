"""The one hook through which mathematics meets many processes: a sum over all of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

AllSum = Callable[[Tensor], Tensor]  # t ↦ Σ over processes, same shape and dtype; may work in place


def one_process(tensor: Tensor) -> Tensor:
    """The sum over a single process."""
    return tensor


def total_count(count: int, all_sum: AllSum) -> float:
    """Samples of all processes, of which this one has `count`."""
    return float(all_sum(torch.tensor(float(count), dtype=torch.float64)))
