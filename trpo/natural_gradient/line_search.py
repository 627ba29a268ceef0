"""Backtracking line search under a KL bound."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum


class Rejection(StrEnum):
    """Why a candidate was refused."""

    NONFINITE = "non-finite surrogate or KL"
    KL = "KL above the bound"
    IMPROVEMENT = "too little improvement of the surrogate"


@dataclass(frozen=True, slots=True)
class LineSearchResult:
    scale: float  # accepted α, 0 if none was
    gain: float  # actual surrogate improvement at α; of a search that found none 0
    kl: float  # actual mean KL at α; as `gain`
    tries: int  # candidates evaluated
    rejections: tuple[Rejection, ...]  # one per refused candidate, in order

    @property
    def accepted(self) -> bool:
        return self.scale > 0


def backtracking_line_search(
    evaluate: Callable[[float], tuple[float, float]],
    *,
    max_kl: float,
    expected_gain: float,
    backtracks: int = 10,
    shrink: float = 0.8,
    accept_ratio: float = 0.0,
) -> LineSearchResult:
    """Finds the first α in 1, shrink, shrink², … that improves the surrogate within the KL bound.

    A candidate is accepted if gain and KL are finite, KL ≤ max_kl, gain > 0, and gain ≥ accept_ratio · α ·
    expected_gain: the prediction at α is always taken from the full step, never compounded over tries. (Schulman et al.
    2015, App. C, has the search and the bound; the ratio is Armijo's, Nocedal & Wright 2006, Alg. 3.1.)

    Args:
        evaluate: α ↦ (surrogate gain over α = 0, mean KL) at θ_old + α · step. May leave θ anywhere.
        max_kl: the bound δ, no slack.
        expected_gain: first-order prediction gᵀ(full step) > 0.
        backtracks: shorter candidates tried after the full one.
        shrink: factor between candidates, in (0, 1).
        accept_ratio: least share of the predicted gain, in [0, 1).
    """
    rejections: list[Rejection] = []
    for k in range(backtracks + 1):
        scale = shrink**k
        gain, kl = evaluate(scale)
        if not (math.isfinite(gain) and math.isfinite(kl)):
            rejections.append(Rejection.NONFINITE)
        elif kl > max_kl:
            rejections.append(Rejection.KL)
        elif gain <= 0 or gain < accept_ratio * scale * expected_gain:
            rejections.append(Rejection.IMPROVEMENT)
        else:
            return LineSearchResult(scale, gain, kl, k + 1, tuple(rejections))
    return LineSearchResult(0.0, 0.0, 0.0, backtracks + 1, tuple(rejections))
