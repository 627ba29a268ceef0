"""The data that flows from collector to update: `Rollout` in time order, `Batch` flat. No behaviour."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Rollout:
    """T steps of N environments, in time order."""

    obs: Tensor  # [T, N, D] acted on, as the environment gave it, until `Agent.scale` normalises it
    next_obs: Tensor  # [T, N, D] true successors, likewise
    action: Tensor  # [T, N, A] as sampled, unclipped
    reward: Tensor  # [T, N] as the environment gave it, until `Agent.scale` scales it; float64
    terminated: Tensor  # [T, N] bool
    truncated: Tensor  # [T, N] bool
    valid: Tensor  # [T, N] bool, False where the row is a reset and no transition


@dataclass(frozen=True, slots=True)
class PastRollout(Rollout):
    """A rollout of policies that need not be the present one."""

    log_prob: Tensor  # [T, N] of the action by the policy that took it


@dataclass(frozen=True, slots=True)
class Batch:
    """The B transitions of a rollout's T·N rows, what the policy update needs."""

    obs: Tensor  # [B, D] normalised
    action: Tensor  # [B, A]
    advantage: Tensor  # [B], times `weight`
    weight: Tensor | None = None  # [B] π_old(a|s)/π_then(a|s), bounded, where others acted; None: π_old did
