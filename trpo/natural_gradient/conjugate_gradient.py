"""Conjugate gradients for Ax = b with A symmetric positive definite, given only as v ↦ Av."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

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
    preconditioner = preconditioner or (lambda r: r)
    if b.is_cpu:  # an accelerator would have to be waited for in every iteration; the solution is the same
        return _stopping(product, b, max_iterations, tolerance, preconditioner)
    return solution(*blind_iterations(product, b, max_iterations, tolerance, preconditioner))


def _stopping(
    product: Callable[[Tensor], Tensor],
    b: Tensor,
    max_iterations: int,
    tolerance: float,
    preconditioner: Callable[[Tensor], Tensor],
) -> CGSolution:
    """The recurrence as books have it."""
    x, r = torch.zeros_like(b), b.clone()
    p = z = preconditioner(r)
    rz, b_norm = float(torch.dot(r, z)), b.norm()
    enough = float(tolerance * b_norm)
    trace: list[list[float]] = []
    running = bool(b_norm != 0)
    while running and len(trace) < max_iterations:
        ap = product(p)
        curvature = float(torch.dot(p, ap))
        if not (0 < curvature < math.inf and 0 < rz < math.inf):
            trace.append([curvature, rz, math.nan, False, False])
            break
        alpha = rz / curvature
        x.add_(p, alpha=alpha)
        r = torch.add(r, ap, alpha=-alpha)
        z = preconditioner(r)
        residual_norm, rz_next = float(r.norm()), float(torch.dot(r, z))
        running = not residual_norm <= enough  # not >: a NaN is found out next time
        trace.append([curvature, rz, residual_norm, True, running])
        p = torch.add(z, p, alpha=rz_next / rz)
        rz = rz_next
    return _solution(x, r, float(b_norm), trace)


def blind_iterations(
    product: Callable[[Tensor], Tensor],
    b: Tensor,
    max_iterations: int,
    tolerance: float,
    preconditioner: Callable[[Tensor], Tensor] = lambda r: r,
) -> tuple[Tensor, Tensor, Tensor]:
    """`conjugate_gradient` up to where somebody has to look: all scalars stay on b's device; nothing waits for them.

    Iterations after the end change nothing. Arguments are those of `conjugate_gradient`.

    Returns:
        x [P], b − Ax [P] and the trace of the iterations, for `solution`.
    """
    x, r = torch.zeros_like(b), b.clone()
    p = z = preconditioner(r)
    rz, b_norm = torch.dot(r, z), b.norm()
    running = b_norm != 0
    trace = []
    for _ in range(max_iterations):
        ap = product(p)
        curvature = torch.dot(p, ap)
        taken = running & (curvature > 0) & (curvature < torch.inf) & (rz > 0) & (rz < torch.inf)
        alpha = rz / curvature
        x = torch.where(taken, torch.addcmul(x, p, alpha), x)
        r = torch.where(taken, torch.addcmul(r, ap, alpha, value=-1), r)
        z = preconditioner(r)
        rz_next = torch.dot(r, z)
        residual_norm = r.norm()
        running = taken & ~(residual_norm <= tolerance * b_norm)
        trace.append(torch.stack([curvature, rz, residual_norm, taken, running]))
        p = torch.addcmul(z, p, rz_next / rz)
        rz = rz_next
    return x, r, torch.cat([b_norm.view(1), *trace])


def solution(x: Tensor, r: Tensor, trace: Tensor) -> CGSolution:
    """What `blind_iterations` found, and how it ended, which takes one look at the device."""
    norm, *flat = trace.tolist()
    return _solution(x, r, norm, [flat[i : i + 5] for i in range(0, len(flat), 5)])


def _solution(x: Tensor, r: Tensor, norm: float, trace: list[list[float]]) -> CGSolution:
    """From ‖b‖ and the trace of all iterations: pᵀAp, rᵀz, ‖r‖, whether it was taken, whether it goes on."""
    if norm == 0:
        return CGSolution(x, r, 0.0, 0, CGStatus.CONVERGED, ritz_values([], []))
    status, residual_norm = CGStatus.ITERATION_LIMIT, norm
    alphas: list[float] = []
    rzs: list[float] = []
    for curvature, rz, row_norm, taken, goes_on in trace:
        if not taken:
            finite = math.isfinite(curvature) and math.isfinite(rz)
            status = CGStatus.NONPOSITIVE_CURVATURE if finite else CGStatus.NONFINITE
            break
        alphas.append(rz / curvature)
        rzs.append(rz)
        residual_norm = row_norm
        if not goes_on:
            status = CGStatus.CONVERGED
            break
    betas = [after / before for before, after in pairwise(rzs)]
    return CGSolution(x, r, residual_norm / norm, len(alphas), status, ritz_values(alphas, betas))


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
