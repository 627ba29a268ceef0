"""Running mean and variance, and return-based reward scaling.

Normalising is pure; statistics change only in `update`, which the agent calls once per iteration: of rewards before
they are scaled, of observations after everything that has to see one fixed policy is done.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from trpo.carried_sums import carried_sums_
from trpo.runtime.reduction import AllSum, one_process

EPSILON = 1e-8  # added to the variance: a constant feature divides by 1e-4, and is clipped


class RunningMoments(nn.Module):
    """Mean and variance of all rows seen, in float64 (Chan, Golub & LeVeque 1979, eq. 2.1)."""

    count: Tensor  # []
    mean: Tensor  # [D]
    m2: Tensor  # [D] sum of squared deviations

    def __init__(self, dim: int):
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(dim, dtype=torch.float64))
        self.register_buffer("m2", torch.zeros(dim, dtype=torch.float64))

    @property
    def variance(self) -> Tensor:
        """Population variance [D]; 1 before anything was seen."""
        return torch.where(self.count > 0, self.m2 / self.count.clamp(min=1), 1.0)

    @torch.no_grad()
    def update(self, rows: Tensor, *, all_sum: AllSum = one_process) -> None:
        """Takes in rows [B, D], of all processes together (sums and counts are reduced, never means)."""
        rows = rows.to(torch.float64)
        # Shifted by the running mean, common to all processes, so that the sums lose no digits to cancellation.
        shifted = rows - self.mean
        total = all_sum(torch.cat([shifted.sum(0), shifted.new_full((1,), float(len(rows)))]))
        count = total[-1]
        if count == 0:
            return
        shift = total[:-1] / count
        m2 = all_sum((shifted - shift).square().sum(0))
        self.merge(count, self.mean + shift, m2)

    @torch.no_grad()
    def merge(self, count: Tensor, mean: Tensor, m2: Tensor) -> None:
        """Takes in the moments of another set of rows."""
        total = (self.count + count).clamp(min=1)  # of two empty sets, too, there are moments
        delta = mean - self.mean
        self.m2.add_(m2 + delta.square() * (self.count * count / total))
        self.mean.add_(delta * (count / total))
        self.count.add_(count)


class ObservationNormalizer(nn.Module):
    """x ↦ clip((x − mean) / √(variance + ε), ±clip), frozen between calls of `update`.

    Args:
        dim: D.
        clip: the bound.
        dtype: of what it gives.
        enabled: else x is only converted.
        plain: components that are only clipped.
    """

    shift: Tensor  # [D] float64: where |mean| ≫ std, subtracting in float32 would lose the digits that matter
    scale: Tensor  # [D] float64

    def __init__(self, dim: int, *, clip: float, dtype: torch.dtype, enabled: bool = True, plain: slice | None = None):
        super().__init__()
        self.enabled = enabled
        self.clip = clip
        self.plain = plain
        self.moments = RunningMoments(dim)
        self.dtype = dtype
        self.register_buffer("shift", torch.zeros(dim, dtype=torch.float64), persistent=False)
        self.register_buffer("scale", torch.ones(dim, dtype=torch.float64), persistent=False)
        self.register_load_state_dict_post_hook(_refresh)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] in any dtype → normalised, in the network's dtype."""
        if not self.enabled:
            return x.to(self.dtype)
        return ((x - self.shift) * self.scale).clamp_(-self.clip, self.clip).to(self.dtype)

    @property
    def affine(self) -> tuple[Tensor, Tensor, float]:
        """shift [D], scale [D] and bound of x ↦ clip((x − shift) · scale, ±bound), which is what this does."""
        if self.enabled:
            return self.shift, self.scale, self.clip
        return torch.zeros_like(self.shift), torch.ones_like(self.scale), math.inf

    def update(self, rows: Tensor, *, all_sum: AllSum = one_process) -> None:
        """Takes in observations [B, D] as the environment gave them."""
        if self.enabled:
            self.moments.update(rows, all_sum=all_sum)
            self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Recomputes shift and scale from the moments."""
        self.shift.copy_(self.moments.mean)
        self.scale.copy_((self.moments.variance + EPSILON).rsqrt())
        if self.plain is not None:
            self.shift[self.plain] = 0
            self.scale[self.plain] = 1


def _refresh(normalizer: ObservationNormalizer, _: object) -> None:
    # No method and no lambda: a copy, or what comes back from a pickle, has to refresh itself.
    normalizer.refresh()


class RewardScaler(nn.Module):
    """r ↦ clip(r / √(variance of the running discounted return + ε), ±clip).

    The return of each environment is G_t = γ G_{t−1} + r_t, started anew with each episode. Scaling changes neither the
    policy's probabilities nor, since advantages are standardised, its gradient; it gives the value network targets of
    order one. Clipping does change the gradient: that of rare rewards far above the std, a lone one at a goal, say.
    """

    returns: Tensor  # [N] G of the running episodes

    def __init__(self, num_envs: int, *, gamma: float, clip: float, enabled: bool = True):
        super().__init__()
        self.enabled = enabled
        self.gamma = gamma
        self.clip = clip
        self.moments = RunningMoments(1)
        self.register_buffer("returns", torch.zeros(num_envs, dtype=torch.float64))

    def forward(self, reward: Tensor) -> Tensor:
        """reward [...] → scaled."""
        if not self.enabled:
            return reward
        return (reward / (self.moments.variance + EPSILON).sqrt()).clamp(-self.clip, self.clip)

    @torch.no_grad()
    def update(self, reward: Tensor, done: Tensor, valid: Tensor, *, all_sum: AllSum = one_process) -> None:
        """Takes in rewards [T, N] with episode ends `done` [T, N]; rows that are no transition are left out."""
        if not self.enabled:
            return
        history = reward.double() * valid
        decay = self.gamma * (~done).double()
        history[0].add_(self.returns, alpha=self.gamma)
        carried_sums_(history, decay[:-1])
        self.returns.copy_(history[-1] * ~done[-1])
        self.moments.update(history[valid].unsqueeze(-1), all_sum=all_sum)
