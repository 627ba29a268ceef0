"""The data that flows from collector to update: `Rollout` in time order, `Batch` flat. No behaviour."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Rollout:
    """T steps of N environments, in time order."""

    obs: Tensor  # [T, N, D] acted on, as the environment gave it (not normalised)
    next_obs: Tensor  # [T, N, D] true successors
    action: Tensor  # [T, N, A] as sampled, unclipped
    reward: Tensor  # [T, N] as the environment gave it (not scaled), float64
    terminated: Tensor  # [T, N] bool
    truncated: Tensor  # [T, N] bool
    valid: Tensor  # [T, N] bool, False where the row is a reset and no transition


@dataclass(frozen=True, slots=True)
class Batch:
    """B = T·N valid transitions in any order, what the policy update needs."""

    obs: Tensor  # [B, D] normalised
    action: Tensor  # [B, A]
    advantage: Tensor  # [B]
