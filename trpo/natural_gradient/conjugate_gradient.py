"""Conjugate gradients for Ax = b with A symmetric positive definite, given only as v ↦ Av."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor


class CGStatus(StrEnum):
    CONVERGED = "converged"
    ITERATION_LIMIT = "iteration limit"
    NONPOSITIVE_CURVATURE = "non-positive curvature"
    NONFINITE = "non-finite value"


@dataclass(frozen=True, slots=True)
class CGSolution:
    """x with Ax ≈ b and what is known about it."""

    x: Tensor  # [P]
    residual: Tensor  # [P] b − Ax, by recurrence
    relative_residual: float  # ‖b − Ax‖ / ‖b‖
    iterations: int
    status: CGStatus
    ritz_values: Tensor  # [iterations] ascending, float64, CPU: estimates of the eigenvalues of A (of P⁻¹A)

    @property
    def condition(self) -> float:
        """Ratio of the extreme Ritz values, a lower bound on the condition number of A."""
        if not len(self.ritz_values) or self.ritz_values[0] <= 0:
            return float("nan")
        return float(self.ritz_values[-1] / self.ritz_values[0])


@torch.no_grad()
def conjugate_gradient(
    product: Callable[[Tensor], Tensor],
    b: Tensor,
    *,
    max_iterations: int,
    tolerance: float = 1e-8,
    preconditioner: Callable[[Tensor], Tensor] | None = None,
) -> CGSolution:
    """Solves Ax = b by (preconditioned) conjugate gradients from x = 0 (Hestenes & Stiefel 1952; Shewchuk 1994, B2–B3).

    Equivalent to `scipy.sparse.linalg.cg(A, b, rtol=tolerance, maxiter=max_iterations)`, except that it says how it
    ended and returns the Ritz values. Nothing is added to a denominator: pᵀAp ≤ 0 or a non-finite value ends the
    iteration with the last good x and a status that says so.

    Args:
        product: v [P] ↦ Av [P].
        b: right-hand side [P], finite.
        max_iterations: at most this many products.
        tolerance: relative: ends when ‖b − Ax‖ ≤ tolerance · ‖b‖.
        preconditioner: v ↦ P⁻¹v with P symmetric positive definite and near A.
    """
    x = torch.zeros_like(b)
    r = b.clone()
    z = preconditioner(r) if preconditioner else r
    p = z.clone()  # a copy: p changes while r must not (the two share storage in a well-known faulty implementation)
    rz = torch.dot(r, z)
    b_norm = float(b.norm())
    residual_norm = b_norm
    alphas: list[float] = []
    betas: list[float] = []
    status = CGStatus.CONVERGED if b_norm == 0 else CGStatus.ITERATION_LIMIT
    while len(alphas) < max_iterations and status is CGStatus.ITERATION_LIMIT:
        ap = product(p)
        # One host read of both scalars: they decide whether this step may be taken.
        curvature, rz_value = torch.stack([torch.dot(p, ap), rz]).tolist()
        if not (abs(curvature) < float("inf") and abs(rz_value) < float("inf")):
            status = CGStatus.NONFINITE
            break
        if curvature <= 0 or rz_value <= 0:
            status = CGStatus.NONPOSITIVE_CURVATURE
            break
        alpha = rz_value / curvature
        x.add_(p, alpha=alpha)
        r.sub_(ap, alpha=alpha)
        z = preconditioner(r) if preconditioner else r
        rz_next = torch.dot(r, z)
        alphas.append(alpha)
        residual_norm = float(r.norm())
        if residual_norm <= tolerance * b_norm:
            status = CGStatus.CONVERGED
            break
        betas.append(float(rz_next) / rz_value)
        p.mul_(betas[-1]).add_(z)
        rz = rz_next
    relative = residual_norm / b_norm if b_norm else 0.0
    return CGSolution(x, r, relative, len(alphas), status, ritz_values(alphas, betas))


def ritz_values(alphas: list[float], betas: list[float]) -> Tensor:
    """Eigenvalues of the Lanczos tridiagonal T that CG builds on its way (Golub & Van Loan, §11.3).

    T_jj = 1/α_j + β_{j−1}/α_{j−1}, T_{j,j+1} = √β_j / α_j.
    """
    n = len(alphas)
    if n == 0:
        return torch.empty(0, dtype=torch.float64)
    a = torch.tensor(alphas, dtype=torch.float64)
    t = torch.diag(1 / a)
    if n > 1:
        b = torch.tensor(betas[: n - 1], dtype=torch.float64)
        t += torch.diag(torch.cat([b.new_zeros(1), b / a[:-1]]))
        off = b.clamp(min=0).sqrt() / a[:-1]
        t += torch.diag(off, 1) + torch.diag(off, -1)
    if not torch.isfinite(t).all():
        return torch.empty(0, dtype=torch.float64)
    return torch.linalg.eigvalsh(t)
