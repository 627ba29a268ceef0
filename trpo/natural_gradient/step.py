"""The TRPO update: one natural-gradient step under a KL bound.

    maximise  L(θ) = E[ π_θ(a|s)/π_old(a|s) · A(s, a) ]   subject to   E[ KL(π_old(·|s) ‖ π_θ(·|s)) ] ≤ δ

    g = ∇L(θ_old)                      policy gradient
    (F + λI) x = g                     natural gradient, by conjugate gradients
    step = √(2δ / xᵀFx) · x            largest step within the quadratic model ½ sᵀFs ≤ δ of the KL
    θ = θ_old + α · step               α by backtracking on the true surrogate and the true KL

(Schulman et al. 2015, eq. 14, §6 and App. C; Kakade 2001.) Nothing here knows of environments or values: a policy, a
batch of (observation, action, advantage) and a bound are all it takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import NamedTuple, Protocol, assert_never

import torch
from torch import Tensor

from trpo.batch import Batch
from trpo.config import LineSearchConfig, NaturalGradientConfig
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
from trpo.natural_gradient.line_search import LineSearchResult, Rejection, backtracking_line_search
from trpo.networks.linearization import Linearization
from trpo.networks.parameters import FlatParameters
from trpo.runtime.reduction import AllSum, one_process, total_count

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


class Outcome(StrEnum):
    """How an update ended. Everything but ACCEPTED leaves θ bitwise as it was."""

    ACCEPTED = "accepted"
    ZERO_GRADIENT = "zero gradient"
    NONFINITE_GRADIENT = "non-finite gradient"
    NONFINITE_PRODUCT = "non-finite Fisher-vector product"
    NONPOSITIVE_CURVATURE = "non-positive curvature"
    NO_CURVATURE = "no curvature: the policy is all but deterministic"
    NO_CANDIDATE = "line search exhausted"
    NONFINITE_STEP = "non-finite surrogate or KL"


@dataclass(frozen=True, slots=True)
class StepReport:
    """What the update did; numbers that do not exist for an outcome are NaN."""

    outcome: Outcome
    max_kl: float
    gradient_norm: float
    step_norm: float = math.nan  # ‖α · step‖
    expected_gain: float = math.nan  # first-order prediction at the accepted α
    gain: float = math.nan  # surrogate improvement found
    quadratic_kl: float = math.nan  # α²δ, the KL the quadratic model predicts
    kl: float = math.nan  # true mean KL
    scale: float = 0.0  # α
    search: LineSearchResult | None = None
    cg: CGSolution | None = None

    @property
    def accepted(self) -> bool:
        return self.outcome is Outcome.ACCEPTED

    @property
    def numerics_failed(self) -> bool:
        """Whether arithmetic broke down, rather than merely this step being of no use.

        F is positive semi-definite: only arithmetic that broke down finds a direction that is not.
        """
        if self.outcome is Outcome.NO_CANDIDATE and self.search is not None:
            return all(rejection is Rejection.NONFINITE for rejection in self.search.rejections)
        return self.outcome in (
            Outcome.NONFINITE_GRADIENT,
            Outcome.NONFINITE_PRODUCT,
            Outcome.NONFINITE_STEP,
            Outcome.NONPOSITIVE_CURVATURE,
        )

    @property
    def reason(self) -> str:
        """The outcome, with what the line search objected to."""
        if self.search is None or not self.search.rejections or self.accepted:
            return str(self.outcome)
        return f"{self.outcome}: last candidate had {self.search.rejections[-1]}"


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


def _gradient(
    policy: PolicyModel, obs: Tensor, action: Tensor, advantage: Tensor
) -> tuple[Linearization, Tensor, Tensor]:
    """Linearisation, scores [B, K] and the sum of the samples' policy gradients [P].

    At θ_old the ratio is 1, so ∇_η (ratio · A) is the score times A and the gradient is one vector-Jacobian product.
    """
    linearization = policy.linearize(obs)
    scores = policy.distribution.score(linearization.output, action)
    return linearization, scores, linearization.vjp(scores * advantage.unsqueeze(-1))


RecordedDirection = Callable[[NaturalGradientConfig, Tensor, Tensor, Tensor], tuple[Tensor, ...]]


@torch.no_grad()
def trust_region_step(
    policy: PolicyModel,
    batch: Batch,
    *,
    max_kl: float,
    settings: NaturalGradientConfig,
    all_sum: AllSum = one_process,
    generator: torch.Generator | None = None,
    direction: RecordedDirection | None = None,
) -> StepReport:
    """Moves `policy` by one TRPO step on `batch`, or leaves it bitwise as it was and says why.

    Args:
        policy: at θ_old, the policy that collected the batch.
        batch: samples of this process; advantages usually standardised over all processes.
        max_kl: δ for this update, above 0.
        settings: damping, CG and line search. What is about a whole run is the caller's: `max_kl` and its `cooldown`,
            `max_kl_per_dimension` and `abort_after`.
        all_sum: sums a tensor over processes; the identity for one.
        generator: draws the Fisher subsample; on the CPU.
        direction: `blind_direction` of this policy, recorded; what it returns is read before its next call.

    Raises:
        ValueError: `max_kl` is not above 0, or the batch has other shapes or dtypes than the policy.
    """
    _check(policy, batch, max_kl)
    theta_old = policy.theta.vector.clone()
    dist = policy.distribution
    count = total_count(len(batch.obs), all_sum)
    if direction is None:
        natural = _natural_gradient(policy, batch, count, settings, all_sum, generator)
    else:
        natural = _recorded_natural_gradient(direction, policy, batch, count, settings)
    report = partial(StepReport, max_kl=max_kl, gradient_norm=natural.gradient_norm, cg=natural.cg)
    if natural.failure is not None:
        return report(natural.failure)

    assert natural.cg is not None
    length = math.sqrt(2 * max_kl / natural.curvature)
    step, expected_gain = length * natural.cg.x, length * natural.slope
    eta_old, log_prob_old = natural.eta_old, dist.log_prob(natural.eta_old, batch.action)

    def evaluate(scale: float) -> tuple[float, float]:
        policy.theta.assign_(torch.add(theta_old, step, alpha=scale))
        eta = policy(batch.obs)
        log_ratio = dist.log_prob(eta, batch.action) - log_prob_old
        gain = (torch.expm1(log_ratio) * batch.advantage).sum(dtype=torch.float64)
        kl = dist.kl(eta_old, eta).sum(dtype=torch.float64)
        gain_sum, kl_sum = all_sum(torch.stack([gain, kl])).tolist()
        return gain_sum / count, kl_sum / count

    try:
        search = _search(evaluate, settings.line_search, max_kl, expected_gain)
    except BaseException:
        policy.theta.assign_(theta_old)
        raise
    if not search.accepted:
        policy.theta.assign_(theta_old)
        return report(Outcome.NO_CANDIDATE if settings.line_search.enabled else Outcome.NONFINITE_STEP, search=search)
    policy.theta.assign_(torch.add(theta_old, step, alpha=search.scale))  # whichever candidate was evaluated last
    return report(
        Outcome.ACCEPTED,
        step_norm=search.scale * length * natural.norm,
        expected_gain=search.scale * expected_gain,
        gain=search.gain,
        quadratic_kl=search.scale**2 * max_kl,
        kl=search.kl,
        scale=search.scale,
        search=search,
    )


def _check(policy: PolicyModel, batch: Batch, max_kl: float) -> None:
    if not max_kl > 0:
        raise ValueError(f"max_kl has to be above 0, not {max_kl}")
    rows, dtype = len(batch.obs), policy.theta.vector.dtype
    for name, tensor, shape in (
        ("action", batch.action, (rows, policy.distribution.action_dim)),
        ("advantage", batch.advantage, (rows,)),
    ):
        if tensor.shape != shape:
            raise ValueError(f"{name} is {list(tensor.shape)}; {rows} observations of this policy have {list(shape)}")
    for name, tensor in (("obs", batch.obs), ("advantage", batch.advantage)):
        if tensor.dtype != dtype:
            raise ValueError(f"{name} is {tensor.dtype}, θ is {dtype}")


@dataclass(frozen=True, slots=True)
class _NaturalGradient:
    """x ≈ (F + λI)⁻¹g at θ_old, or why there is none to go along."""

    eta_old: Tensor  # [B, K]
    gradient_norm: float
    failure: Outcome | None
    cg: CGSolution | None = None  # has x; None if g was of no use
    curvature: float = math.nan  # xᵀFx > 0, this and what follows: without failure
    slope: float = math.nan  # gᵀx
    norm: float = math.nan  # ‖x‖


def _natural_gradient(
    policy: PolicyModel,
    batch: Batch,
    count: float,
    settings: NaturalGradientConfig,
    all_sum: AllSum,
    generator: torch.Generator | None,
) -> _NaturalGradient:
    linearization, scores, gradient = _gradient(policy, batch.obs, batch.action, batch.advantage)
    gradient = all_sum(gradient).div_(count)
    gradient_norm = float(gradient.norm())
    if failure := _useless(gradient, gradient_norm):
        return _NaturalGradient(linearization.output, gradient_norm, failure)
    fisher, preconditioner = _fisher(policy, linearization, batch.obs, scores, count, settings, all_sum, generator)
    cg = conjugate_gradient(
        lambda v: fisher(v).add_(v, alpha=settings.damping),
        gradient,
        max_iterations=settings.cg_iterations,
        tolerance=settings.cg_tolerance,
        preconditioner=preconditioner,
    )
    return _judged(linearization.output, gradient, gradient_norm, cg, fisher, settings.damping)


def _recorded_natural_gradient(
    direction: RecordedDirection, policy: PolicyModel, batch: Batch, count: float, settings: NaturalGradientConfig
) -> _NaturalGradient:
    """The same by `direction`; what is kept for the report in copies."""
    found = Direction(*direction(settings, batch.obs, batch.action, batch.advantage))
    gradient_norm = float(found.gradient_norm)
    if failure := _useless(found.gradient, gradient_norm):
        return _NaturalGradient(found.eta, gradient_norm, failure)
    cg = solution(found.x.clone(), found.residual.clone(), found.trace)

    def fisher(v: Tensor) -> Tensor:  # seldom asked for
        return fisher_product(policy.linearize(batch.obs), policy.distribution, count=count)(v)

    return _judged(found.eta, found.gradient, gradient_norm, cg, fisher, settings.damping)


def _useless(gradient: Tensor, norm: float) -> Outcome | None:
    """Why there is nothing to solve for."""
    if not math.isfinite(norm):
        return Outcome.NONFINITE_GRADIENT
    if norm**2 < torch.finfo(gradient.dtype).tiny:  # CG could not hold its square
        return Outcome.ZERO_GRADIENT
    return None


def _judged(
    eta_old: Tensor, gradient: Tensor, gradient_norm: float, cg: CGSolution, fisher: Product, damping: float
) -> _NaturalGradient:
    """What CG found, with its curvature, if it is one to go along."""
    natural = partial(_NaturalGradient, eta_old, gradient_norm, cg=cg)
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


def _search(
    evaluate: Callable[[float], tuple[float, float]], settings: LineSearchConfig, max_kl: float, expected_gain: float
) -> LineSearchResult:
    """The line search, or with it disabled the plain natural policy gradient: the full step if it is finite."""
    if settings.enabled:
        return backtracking_line_search(
            evaluate,
            max_kl=max_kl,
            expected_gain=expected_gain,
            backtracks=settings.backtracks,
            shrink=settings.shrink,
            accept_ratio=settings.accept_ratio,
        )
    gain, kl = evaluate(1.0)
    return LineSearchResult(1.0 if math.isfinite(gain) and math.isfinite(kl) else 0.0, gain, kl, 1, ())
