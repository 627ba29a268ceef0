"""Sums over time of which a part is carried from step to step: what discounted returns and advantages both are."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor

from trpo import native


def carried_sums_(x: Tensor, carry: Tensor, *, reverse: bool = False) -> Tensor:
    """x_{t+1} ← x_{t+1} + c_t x_t for t = 0, 1, …, in place; or reversed x_t ← x_t + c_t x_{t+1} from the end on.

    Args:
        x: [T, …].
        carry: [T − 1, …] c, in the dtype of x.
        reverse: from the last to the first.

    Returns:
        x.

    Raises:
        ValueError: `carry` is of another shape.
    """
    if carry.shape != (len(x) - 1, *x.shape[1:]):
        raise ValueError(f"a carry of shape {list(carry.shape)} between the rows of {list(x.shape)}")
    if native.carried_sums(x, carry, reverse=reverse):
        return x
    rows, carries, steps = x.unbind(), carry.unbind(), range(len(x))
    for before, after in pairwise(reversed(steps) if reverse else steps):
        rows[after].addcmul_(carries[min(before, after)], rows[before])
    return x
