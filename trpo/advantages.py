"""Generalised advantage estimation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trpo.carried_sums import carried_sums_
from trpo.runtime.reduction import AllSum, one_process


def gae(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    *,
    gamma: float,
    lambda_: float,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Advantages and value targets over time (Schulman et al. 2016, eq. 16).

        δ_t = r_t + γ (1 − terminated_t) V(s′_t) − V(s_t)
        Â_t = δ_t + γλ (1 − terminated_t)(1 − truncated_t) Â_{t+1}
        R_t = Â_t + V(s_t)

    s′_t is the true successor, so a truncated step bootstraps with the value of the state it was cut in, and a
    terminated one with 0; both end the λ-sum. After the last step the sum is cut and bootstrapped likewise.

    Args:
        reward: [T, N] r_t, received for the action at time t.
        value: [T, N] V(s_t).
        next_value: [T, N] V(s′_t), ignored where terminated.
        terminated: [T, N] bool.
        truncated: [T, N] bool.
        gamma: discount γ ∈ [0, 1].
        lambda_: λ ∈ [0, 1]; 0 gives one-step TD errors, 1 Monte Carlo returns minus V.
        valid: [T, N] bool, False where the row is a reset and no transition: such rows get advantage 0 and cut the sum.

    Returns:
        (advantage [T, N], return target [T, N]).
    """
    carry = ~(terminated | truncated)
    delta = reward + gamma * torch.where(terminated, 0.0, next_value) - value
    if valid is not None:
        carry = carry & valid
        delta = torch.where(valid, delta, 0.0)
    decay = (gamma * lambda_) * carry.to(delta.dtype)  # a float times a bool would be float32
    advantage = carried_sums_(delta, decay[:-1], reverse=True)
    return advantage, advantage + value


def horizon_lambda(gamma: float, factor: float) -> float:
    """λ = 1 − c√(1 − γ), at least 0: looks √H/c steps ahead where the discount looks H = 1/(1 − γ).

    For value targets: what V does not yet know of H steps travels 1/(1 − λ) steps an update, so that learning it takes
    H(1 − λ) updates, while the noise of a target grows with the 1/(1 − λ) rewards in it. Their sum is least where
    1/(1 − λ) ∝ √H. For advantages: the error of V that is let in, against the same noise.

    Args:
        gamma: γ ∈ [0, 1].
        factor: c; ½ for value targets makes λ 0.95 for γ = 0.99, 1 and 2 for advantages 0.9 and 0.8.
    """
    return max(0.0, 1 - factor * math.sqrt(1 - gamma))


def standardize(advantage: Tensor, all_sum: AllSum = one_process) -> Tensor:
    """(Â − mean) / std [B] over the samples of all processes; zeros if all are equal.

    "Equal" allows for rounding: a std below 1e-6 of the mean carries no signal, and dividing by it would only blow up
    noise.
    """
    wide = advantage.double()
    total, count = all_sum(torch.stack([wide.sum(), torch.ones_like(wide).sum()])).tolist()
    mean = total / count
    std = math.sqrt(float(all_sum((wide - mean).square().sum())) / count)
    if std <= 1e-6 * abs(mean):
        return torch.zeros_like(advantage)
    return ((wide - mean) / std).to(advantage.dtype)
