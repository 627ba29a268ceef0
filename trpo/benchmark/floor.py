"""The least time a TRPO policy update can take: the arithmetic of its matrix products at this machine's own rate."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from trpo.benchmark.work import wait
from trpo.runtime.cuda_graph import Recorded

# MKL's, and that of oneDNN, for CPUs, which torch brings along for its compiler: it uses AVX-512 on all processors.
_PRODUCTS: list[Callable[[Tensor, Tensor], object]] = [torch.mm]
if torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
    _PRODUCTS.append(lambda a, b: torch.ops.mkldnn._linear_pointwise(a, b.T, None, "none", [], ""))


def update_flops(sizes: Sequence[int], batch: int, *, cg_iterations: int, evaluations: int) -> int:
    """Floating-point operations of the matrix products of one policy update, a multiply-add counted as two.

    A layer n → m costs 2·B·n·m per product with its weights. With W = Σ n·m over all layers and W′ the same without
    the first, whose inputs carry no derivative:

        forward                          2BW
        Jᵀu: Σ δhᵀ, then δ backwards     2BW + 2BW′
        Jv:  h dWᵀ, then dh Wᵀ           2BW + 2BW′

    The update is one forward pass at θ_old, one Jᵀu for the gradient, a Jv and a Jᵀu per CG iteration, and one forward
    pass per candidate of the line search. Activations, distributions and vectors of θ are left out: the floor is one
    that cannot be reached.

    >>> update_flops([2, 3, 1], 10, cg_iterations=1, evaluations=1)  # W = 9, W′ = 3
    1080
    """
    weights = [n * m for n, m in pairwise(sizes)]
    forward = 2 * batch * sum(weights)
    product = forward + 2 * batch * sum(weights[1:])
    return (1 + evaluations) * forward + (1 + 2 * cg_iterations) * product


@torch.no_grad()
def matmul_rate(width: int, batch: int, *, repeats: int = 20, device: str = "cpu") -> float:
    """Most floating-point operations per second of float32 products shaped like those of a hidden layer.

    Best over rows, orientation ([B, h] × [h, h] and [h, B] × [B, h]), torch's libraries, and repeats: a floor wants the
    machine at its best, at the number of threads torch has in this process. On a GPU of many products started as one,
    since to start one takes longer than to do it.
    """
    best = 0.0
    at_once = 1 if device == "cpu" else 50
    for rows in {256, 1024, batch}:
        left, square = torch.randn(rows, width, device=device), torch.randn(width, width, device=device)
        for a, b in ((left, square), (left.T, left)):
            for multiply in _PRODUCTS if device == "cpu" else [_many(at_once)]:
                for _ in range(3):  # recorded the second time
                    multiply(a, b)
                wait(device)
                for _ in range(repeats):
                    start = time.perf_counter()
                    multiply(a, b)
                    wait(device)
                    best = max(best, at_once * 2 * rows * width * width / (time.perf_counter() - start))
    return best


def _many(count: int) -> Callable[[Tensor, Tensor], object]:
    def products(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        for _ in range(count):
            product = a @ b
        return (product,)

    return Recorded(products)
