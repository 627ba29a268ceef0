"""The direction of a TRPO step: the policy gradient g, and x ≈ (F + λI)⁻¹g by conjugate gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol, assert_never

import torch
from torch import Tensor

from trpo.batch import Batch
from trpo.config import NaturalGradientConfig
from trpo.distributions import Distribution
from trpo.errors import UserError
from trpo.natural_gradient.conjugate_gradient import (
    CGSolution,
    CGStatus,
    blind_iterations,
    conjugate_gradient,
    solution,
)
from trpo.natural_gradient.fisher import fisher_product
from trpo.natural_gradient.kronecker import HasFactors, KroneckerPreconditioner
from trpo.natural_gradient.report import Outcome
from trpo.networks.linearization import Linearization
from trpo.networks.parameters import FlatParameters
from trpo.runtime.reduction import AllSum, total_count

Product = Callable[[Tensor], Tensor]  # v ↦ Fv

# Where a failure of arithmetic is told from one of no consequence; float32 has seven digits, of which CG loses some.
ALL_BUT_SOLVED = 0.01  # relative residual: pᵀAp of what is left of such a system may have any sign
ROUNDING = 1e-3  # of gᵀx: a smaller xᵀFx, as a difference or of a policy without curvature, may have any sign


class PolicyModel(Protocol):
    """What a policy has to offer to be trained here."""

    distribution: Distribution
    theta: FlatParameters

    def __call__(self, obs: Tensor) -> Tensor:
        """Distribution parameters η [B, K] for normalised observations [B, D]."""

    def linearize(self, obs: Tensor) -> Linearization:
        """η and its Jacobian at the current θ."""


@dataclass(frozen=True, slots=True)
class NaturalGradient:
    """x ≈ (F + λI)⁻¹g at θ_old, or why there is none to go along."""

    eta_old: Tensor  # [B, K]
    gradient_norm: float
    failure: Outcome | None
    cg: CGSolution | None = None  # has x; None if g was of no use
    curvature: float = math.nan  # xᵀFx > 0, this and what follows: without failure
    slope: float = math.nan  # gᵀx
    norm: float = math.nan  # ‖x‖


def natural_gradient(
    policy: PolicyModel,
    batch: Batch,
    count: float,
    settings: NaturalGradientConfig,
    all_sum: AllSum,
    generator: torch.Generator | None,
) -> NaturalGradient:
    """Policy gradient, Fisher matrix and CG; arguments as of `trust_region_step`.

    Args:
        count: samples of all processes together.
    """
    linearization, scores, gradient = _gradient(policy, batch.obs, batch.action, batch.advantage)
    gradient = all_sum(gradient).div_(count)
    gradient_norm = float(gradient.norm())
    if failure := _useless(gradient, gradient_norm):
        return NaturalGradient(linearization.output, gradient_norm, failure)
    fisher, preconditioner = _fisher(policy, linearization, batch.obs, scores, count, settings, all_sum, generator)
    cg = conjugate_gradient(
        lambda v: fisher(v).add_(v, alpha=settings.damping),
        gradient,
        max_iterations=settings.cg_iterations,
        tolerance=settings.cg_tolerance,
        preconditioner=preconditioner,
    )
    return _judged(linearization.output, gradient, gradient_norm, cg, fisher, settings.damping)


def _gradient(
    policy: PolicyModel, obs: Tensor, action: Tensor, advantage: Tensor
) -> tuple[Linearization, Tensor, Tensor]:
    """Linearisation, scores [B, K] and the sum of the samples' policy gradients [P].

    At θ_old the ratio is 1, so ∇_η (ratio · A) is the score times A and the gradient is one vector-Jacobian product.
    """
    linearization = policy.linearize(obs)
    scores = policy.distribution.score(linearization.output, action)
    return linearization, scores, linearization.vjp(scores * advantage.unsqueeze(-1))


def _fisher(
    policy: PolicyModel,
    linearization: Linearization,
    obs: Tensor,
    scores: Tensor,
    count: float,
    settings: NaturalGradientConfig,
    all_sum: AllSum,
    generator: torch.Generator | None,
) -> tuple[Product, KroneckerPreconditioner | None]:
    """Fisher product and preconditioner, over the batch or a random share of it.

    Gradient and line search always see the whole batch.
    """
    if settings.fisher_subsample < 1:
        keep = max(1, round(settings.fisher_subsample * len(obs)))
        rows = torch.randperm(len(obs), generator=generator)[:keep].to(obs.device)
        linearization, scores = policy.linearize(obs[rows]), scores[rows]
        count = total_count(len(rows), all_sum)
    product = fisher_product(linearization, policy.distribution, count=count, all_sum=all_sum)
    if settings.preconditioner is None:
        return product, None
    if not isinstance(linearization, HasFactors):
        raise UserError(
            "natural_gradient.preconditioner: kronecker needs the built-in networks, none of it frozen; set it to null"
        )
    match settings.preconditioner:
        case "kronecker":
            return product, KroneckerPreconditioner(
                linearization, scores, count=count, damping=settings.damping, all_sum=all_sum
            )
        case _:
            assert_never(settings.preconditioner)


def _useless(gradient: Tensor, norm: float) -> Outcome | None:
    """Why there is nothing to solve for."""
    if not math.isfinite(norm):
        return Outcome.NONFINITE_GRADIENT
    if norm**2 < torch.finfo(gradient.dtype).tiny:  # CG could not hold its square
        return Outcome.ZERO_GRADIENT
    return None


def _judged(
    eta_old: Tensor, gradient: Tensor, gradient_norm: float, cg: CGSolution, fisher: Product, damping: float
) -> NaturalGradient:
    """What CG found, with its curvature, if it is one to go along."""
    natural = partial(NaturalGradient, eta_old, gradient_norm, cg=cg)
    if cg.status is CGStatus.NONFINITE:
        return natural(Outcome.NONFINITE_PRODUCT)
    # Of a system that is all but solved it is rounding: x is as exact as its digits allow.
    if cg.status is CGStatus.NONPOSITIVE_CURVATURE and not cg.relative_residual < ALL_BUT_SOLVED:
        return natural(Outcome.NONPOSITIVE_CURVATURE)
    # xᵀFx, without λ: damping turns the step and does not shorten it. It takes no product, Fx = g − residual − λx,
    # unless λ was all there was, and the difference is rounding.
    fx = gradient - cg.residual - damping * cg.x
    curvature, slope, norm = torch.stack([torch.dot(cg.x, fx), torch.dot(cg.x, gradient), cg.x.norm()]).tolist()
    rounding = ROUNDING * slope
    if curvature < rounding:
        curvature = float(torch.dot(cg.x, fisher(cg.x)))
    if not curvature > 0:
        # Of a policy that is nearly certain of its actions F itself is rounding, of either sign. That breaks nothing.
        return natural(Outcome.NO_CURVATURE if curvature >= -rounding else Outcome.NONPOSITIVE_CURVATURE)
    return natural(None, curvature=curvature, slope=slope, norm=norm)


class Direction(NamedTuple):
    """What `blind_direction` finds."""

    eta: Tensor  # η_old [B, K]
    gradient: Tensor  # g [P]
    gradient_norm: Tensor  # []
    x: Tensor  # [P] this and what follows: of `blind_iterations`
    residual: Tensor
    trace: Tensor


@torch.no_grad()
def blind_direction(
    policy: PolicyModel, settings: NaturalGradientConfig, obs: Tensor, action: Tensor, advantage: Tensor
) -> Direction:
    """All of a step that comes before its line search, by operations of which none waits for another's result.

    Of one process, the whole batch and without preconditioner. So it can be recorded (`trpo.runtime.cuda_graph`).
    """
    count = float(len(obs))
    linearization, _, gradient = _gradient(policy, obs, action, advantage)
    gradient.div_(count)
    fisher = fisher_product(linearization, policy.distribution, count=count)
    x, residual, trace = blind_iterations(
        lambda v: fisher(v).add_(v, alpha=settings.damping), gradient, settings.cg_iterations, settings.cg_tolerance
    )
    return Direction(linearization.output, gradient, gradient.norm(), x, residual, trace)


RecordedDirection = Callable[[NaturalGradientConfig, Tensor, Tensor, Tensor], tuple[Tensor, ...]]


def recorded_natural_gradient(
    direction: RecordedDirection, policy: PolicyModel, batch: Batch, count: float, settings: NaturalGradientConfig
) -> NaturalGradient:
    """`natural_gradient` by `direction`; what is kept for the report in copies."""
    found = Direction(*direction(settings, batch.obs, batch.action, batch.advantage))
    gradient_norm = float(found.gradient_norm)
    if failure := _useless(found.gradient, gradient_norm):
        return NaturalGradient(found.eta, gradient_norm, failure)
    cg = solution(found.x.clone(), found.residual.clone(), found.trace)

    def fisher(v: Tensor) -> Tensor:  # seldom asked for
        return fisher_product(policy.linearize(batch.obs), policy.distribution, count=count)(v)

    return _judged(found.eta, found.gradient, gradient_norm, cg, fisher, settings.damping)
