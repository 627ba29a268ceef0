"""Rollouts of earlier policies, to be learned from again beside the newest one.

    L(θ) = E_{s, a ~ π_then} [ π_θ(a|s)/π_then(a|s) · Â ] = E [ π_θ(a|s)/π_old(a|s) · wÂ ],   w = π_old(a|s)/π_then(a|s)

An update of several rollouts is one of a larger batch whose advantages are weighted by w: its gradient and its Fisher
matrix are less noisy, and of states that are a little of the past (Queeney et al. 2021; for TRPO, Queeney et al. 2022).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from trpo.batch import PastRollout
from trpo.runtime.reduction import AllSum, one_process

MAX_WEIGHT = 2.0  # an action that was unlikely then would outvote all others now (Ionides 2008)


def importance_weight(log_prob_now: Tensor, log_prob_then: Tensor) -> Tensor:
    """w of each sample, at most `MAX_WEIGHT`."""
    return (log_prob_now - log_prob_then).exp().clamp(max=MAX_WEIGHT)


def effective_share(weight: Tensor, all_sum: AllSum = one_process) -> float:
    """(Σw)²/(B Σw²) over all processes: the share of samples that, counting alike, would say as much (Kish 1965)."""
    wide = weight.double()
    sums = torch.stack([wide.sum(), wide.square().sum(), torch.ones_like(wide).sum()])
    total, squares, count = all_sum(sums).tolist()
    return total**2 / (count * squares)


def joined(rollouts: Sequence[PastRollout]) -> PastRollout:
    """K rollouts [T, N] as one of K·N environments [T, K·N]."""
    return PastRollout(**{name: torch.cat([getattr(rollout, name) for rollout in rollouts], 1) for name in _PARTS})


class EarlierRollouts:
    """The latest rollouts, as the environments gave them.

    Args:
        keep: how many.

    Attributes:
        rollouts: the oldest first, which makes room for one that is appended.
    """

    def __init__(self, keep: int):
        self.keep = keep
        self.rollouts: deque[PastRollout] = deque(maxlen=keep)

    def state_dict(self) -> list[dict[str, Any]]:
        return [{name: getattr(rollout, name) for name in _PARTS} for rollout in self.rollouts]

    def load_state_dict(self, state: list[dict[str, Any]], device: torch.device) -> None:
        self.rollouts.clear()
        for rollout in state:
            self.rollouts.append(PastRollout(**{name: part.to(device) for name, part in rollout.items()}))


_PARTS = tuple(field.name for field in fields(PastRollout))
