"""How many directions a step follows, damping given.

A step (F + λI)⁻¹g follows an eigenvector of F with eigenvalue f by its share f/(f + λ): all of those well above λ, none
of those well below. They add up to the degrees of freedom of ridge regression,

    d(λ) = Σ f / (f + λ) = tr F (F + λI)⁻¹        (Zhang 2005)

that the step fits to B samples. Where advantages of variance 1 do not depend on the scores, the gradient's noise has
the covariance F/B, and its energy E[gᵀ(F + λI)⁻¹g] is d(λ)/B. With hundreds of observations, many actions and little
damping there are more of them than samples. Action noise with a memory makes samples depend on each other, and the
noise larger.
"""

from __future__ import annotations

import torch

from trpo.batch import Batch
from trpo.natural_gradient.conjugate_gradient import conjugate_gradient
from trpo.natural_gradient.direction import PolicyModel
from trpo.natural_gradient.fisher import fisher_product
from trpo.runtime.reduction import AllSum, one_process, total_count


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
