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
from functools import partial

import torch

from trpo.batch import Batch
from trpo.config import LineSearchConfig, NaturalGradientConfig
from trpo.natural_gradient.direction import (
    PolicyModel,
    RecordedDirection,
    natural_gradient,
    recorded_natural_gradient,
)
from trpo.natural_gradient.line_search import LineSearchResult, backtracking_line_search
from trpo.natural_gradient.report import Outcome, StepReport
from trpo.runtime.reduction import AllSum, one_process, total_count


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
        natural = natural_gradient(policy, batch, count, settings, all_sum, generator)
    else:
        natural = recorded_natural_gradient(direction, policy, batch, count, settings)
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
