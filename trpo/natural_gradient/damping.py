"""How much to damp: as far as a batch cannot tell directions from noise.

In the natural metric every direction of θ whose eigenvalue f of F is well above λ carries the same noise, and those
well below it none: the gradient of B samples has the noise covariance F/B (advantages standardised), so that along an
eigenvector the step's share f/(f + λ) of its noise adds up to the effective dimension

    d(λ) = Σ f / (f + λ) = tr F (F + λI)⁻¹        (Zhang 2005)

degrees of freedom that the step fits to B samples. With hundreds of observations and many actions there are more of
them than samples. λ is therefore raised until d(λ) is a given share of B.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from trpo.batch import Batch
from trpo.config import NaturalGradientConfig
from trpo.natural_gradient.conjugate_gradient import conjugate_gradient
from trpo.natural_gradient.fisher import fisher_product
from trpo.natural_gradient.step import PolicyModel
from trpo.reduction import AllSum, one_process, total_count

EVERY = 10  # updates between two looks at d(λ), each of which costs as much as the CG of a step


@torch.no_grad()
def effective_dimension(
    policy: PolicyModel,
    batch: Batch,
    *,
    damping: float,
    cg_iterations: int,
    cg_tolerance: float = 1e-8,
    all_sum: AllSum = one_process,
    generator: torch.Generator | None = None,
) -> float:
    """An estimate of d(λ) = tr F(F + λI)⁻¹ from one gradient of pure noise.

    With random signs ξ for advantages, g̃ = Σ ξ_i ∇log π(a_i|s_i) / B has mean 0 and covariance F/B, and
    E[B g̃ᵀ(F + λI)⁻¹g̃] = d(λ). Its relative standard deviation is about √(2/d). CG that ends early gives less than d.

    Args:
        policy: at θ, from which the actions of the batch were drawn.
        batch: samples of this process.
        damping: λ > 0.
        cg_iterations: most CG iterations.
        cg_tolerance: of CG.
        all_sum: sums a tensor over processes.
        generator: draws the signs; on the CPU.
    """
    linearization = policy.linearize(batch.obs)
    count = total_count(len(batch.obs), all_sum)
    signs = torch.randint(2, (len(batch.obs), 1), generator=generator).to(batch.obs) * 2 - 1
    score = policy.distribution.score(linearization.output, batch.action)
    noise = all_sum(linearization.vjp(score * signs)).div_(count)
    fisher = fisher_product(linearization, policy.distribution, count=count, all_sum=all_sum)
    solution = conjugate_gradient(
        lambda v: fisher(v).add_(v, alpha=damping), noise, max_iterations=cg_iterations, tolerance=cg_tolerance
    )
    return count * float(torch.dot(noise, solution.x))


class Damping:
    """λ of an update, which follows the effective dimension if `settings` say so.

    d falls more slowly than 1/λ, so that λ ← λ · d / (share · B) approaches its goal from one side. The first look is
    at the first update.

    Attributes:
        value: λ.
    """

    def __init__(self, settings: NaturalGradientConfig):
        self.settings = settings
        self.value = settings.damping
        self.updates = 0

    def follow(
        self, policy: PolicyModel, batch: Batch, *, all_sum: AllSum = one_process, generator: torch.Generator
    ) -> None:
        """Moves λ before a step on `batch`, now and then; arguments as in `effective_dimension`."""
        settings = self.settings
        if settings.effective_dimension is None:
            return
        if self.updates % EVERY == 0:
            count = total_count(len(batch.obs), all_sum)
            dimension = effective_dimension(
                policy,
                batch,
                damping=self.value,
                cg_iterations=settings.cg_iterations,
                cg_tolerance=settings.cg_tolerance,
                all_sum=all_sum,
                generator=generator,
            )
            if math.isfinite(dimension):  # else the step, next, meets the same numbers and says so
                self.value = max(settings.damping, self.value * dimension / (settings.effective_dimension * count))
        self.updates += 1

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value, self.updates = state["value"], state["updates"]
