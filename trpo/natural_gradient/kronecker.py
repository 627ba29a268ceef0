"""A Kronecker-factored preconditioner for conjugate gradients on the damped Fisher matrix.

For a layer z = W h̃ with input h̃ = (h, 1) the Fisher block is E[h̃h̃ᵀ ⊗ δδᵀ], δ the back-propagated score. Taking
the expectations apart gives A ⊗ S with A = E[h̃h̃ᵀ] and S = E[δδᵀ] (Martens & Grosse 2015, eq. 1 and §3). As an inverse
of its own this is K-FAC; as a preconditioner P ≈ F + λI it only has to be near: CG still solves the exact system, with
far fewer products.

The scores are those of the batch's actions. The policy drew them itself (nearly so, where its noise has a memory), so
that the covariance of their scores is the metric M by the definition of the Fisher information, and one backward pass
gives all S.
"""

from __future__ import annotations

import contextlib
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from trpo.networks.linearization import Factors
from trpo.runtime.reduction import AllSum, one_process


@runtime_checkable
class HasFactors(Protocol):
    """A linearisation that knows its layers."""

    def kronecker_factors(self, u: Tensor) -> list[Factors]:
        """Factors of all blocks, in the order of θ, for output cotangents u [B, K]."""


class KroneckerPreconditioner:
    """v ↦ P⁻¹v with P = blockdiag(A ⊗ S + λI), by the eigenvectors of A and S.

    Args:
        linearization: at θ_old.
        scores: score(η_old, a) [B, K] of actions a that the policy drew.
        count: samples of all processes together.
        damping: λ, that of the system to solve.
        all_sum: sums a tensor over processes.
    """

    @torch.no_grad()
    def __init__(
        self, linearization: HasFactors, scores: Tensor, *, count: float, damping: float, all_sum: AllSum = one_process
    ):
        self._blocks = []
        for factors in linearization.kronecker_factors(scores):
            a, u_a = _eigen(all_sum(factors.inputs) / count)
            s, u_s = _eigen(all_sum(factors.outputs) / count)
            # Rounding can make eigenvalues of a singular factor slightly negative; they are 0.
            scale = 1 / (torch.outer(s.clamp(min=0), a.clamp(min=0)) + damping)
            self._blocks.append((u_a, u_s, scale))

    @torch.no_grad()
    def __call__(self, v: Tensor) -> Tensor:
        """P⁻¹v [P] for v [P]: U_S ((U_Sᵀ V U_A) / (s aᵀ + λ)) U_Aᵀ for each block V = [weight | bias]."""
        out = torch.empty_like(v)
        start = 0
        for u_a, u_s, scale in self._blocks:
            m, columns = len(u_s), len(u_a)
            stop = start + m * columns
            weight, bias = v[start : stop - m].view(m, columns - 1), v[stop - m : stop].view(m, 1)
            block = u_s @ ((u_s.T @ torch.cat([weight, bias], 1) @ u_a).mul_(scale)) @ u_a.T
            out[start : stop - m].view(m, columns - 1).copy_(block[:, :-1])
            out[stop - m : stop].copy_(block[:, -1])
            start = stop
        return out


def _eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of a symmetric matrix; NaN of one that has none, which CG then meets."""
    # In float32 the algorithm may not converge where hundreds of eigenvalues are equal: inputs that are one-hot.
    for precise in (matrix, matrix.double()):
        with contextlib.suppress(torch.linalg.LinAlgError):  # type: ignore[attr-defined]
            values, vectors = torch.linalg.eigh(precise)
            return values.to(matrix.dtype), vectors.to(matrix.dtype)
    return torch.full_like(matrix[0], torch.nan), torch.full_like(matrix, torch.nan)
