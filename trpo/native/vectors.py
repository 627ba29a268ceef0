"""Small loops of an update that are slow in Python: sums over time, a step of Adam."""

from __future__ import annotations

import torch
from torch import Tensor

from trpo.native import library
from trpo.native.library import plain, wanted


def carried_sums(x: Tensor, carry: Tensor, *, reverse: bool) -> bool:
    """`trpo.carried_sums` of x [T, …] in place, if the compiled functions can."""
    name = {torch.float32: "carried_sums_float", torch.float64: "carried_sums_double"}.get(x.dtype)
    fits = carry.shape == (len(x) - 1, *x.shape[1:]) and x.is_contiguous() and carry.is_contiguous()
    if name is None or not (wanted() and fits and plain(x, x.dtype) and plain(carry, x.dtype)):
        return False
    getattr(library.LIBRARY, name)(len(x), x[0].numel(), x.data_ptr(), carry.data_ptr(), reverse)
    return True


def takes_vectors(*vectors: Tensor) -> bool:
    """Whether `adam_step` may work on these."""
    size = vectors[0].shape
    return wanted() and len(size) == 1 and all(plain(x) and x.shape == size and x.is_contiguous() for x in vectors)


def adam_step(
    theta: Tensor,
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    *,
    betas: tuple[float, float],
    epsilon: float,
    rate: float,
) -> None:
    """θ ← θ − rate · m / (√s + ε) after m and s have taken in the gradient; all [P] of `takes_vectors`, in place."""
    vectors = (theta, gradient, mean, square)
    library.LIBRARY.adam_step(len(theta), *(x.data_ptr() for x in vectors), *betas, epsilon, rate)
