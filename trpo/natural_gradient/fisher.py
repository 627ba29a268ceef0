"""Products with the Fisher matrix of a policy, never the matrix itself.

The second derivative of KL(π_old ‖ π_θ) at θ_old is F = Jᵀ M J / B: J is the Jacobian of the distribution parameters
η(θ), M the Fisher metric of the distribution in η. At θ_old the first derivative of the KL in η vanishes, so the term
with the second derivative of the network drops out and F is exactly the Gauss-Newton matrix (Martens 2020, §9.2;
Schulman et al. 2015, App. C).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from trpo.distributions import Distribution
from trpo.networks.linearization import Linearization
from trpo.runtime.reduction import AllSum, one_process


def fisher_product(
    linearization: Linearization,
    distribution: Distribution,
    *,
    count: float,
    all_sum: AllSum = one_process,
) -> Callable[[Tensor], Tensor]:
    """Returns v ↦ Fv = Jᵀ M J v / count.

    Args:
        linearization: of η(θ) at θ_old, for the samples [B] of this process.
        distribution: gives the metric M(η_old).
        count: number of samples of all processes together.
        all_sum: sums a vector [P] over processes.
    """
    metric = distribution.metric(linearization.output)

    def product(v: Tensor) -> Tensor:
        return all_sum(linearization.vjp(metric(linearization.jvp(v)))).div_(count)

    return product
