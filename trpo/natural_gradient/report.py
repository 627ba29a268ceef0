"""What became of a TRPO step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from trpo.natural_gradient.conjugate_gradient import CGSolution
from trpo.natural_gradient.line_search import LineSearchResult, Rejection


class Outcome(StrEnum):
    """How an update ended. Everything but ACCEPTED leaves θ bitwise as it was."""

    ACCEPTED = "accepted"
    RESTED = "learning has not started"
    ZERO_GRADIENT = "zero gradient"
    NONFINITE_GRADIENT = "non-finite gradient"
    NONFINITE_PRODUCT = "non-finite Fisher-vector product"
    NONPOSITIVE_CURVATURE = "non-positive curvature"
    NO_CURVATURE = "no curvature: the policy is all but deterministic"
    NO_CANDIDATE = "line search exhausted"
    NONFINITE_STEP = "non-finite surrogate or KL"


@dataclass(frozen=True, slots=True)
class StepReport:
    """What the update did; numbers that do not exist for an outcome are NaN."""

    outcome: Outcome
    max_kl: float = math.nan
    gradient_norm: float = math.nan
    step_norm: float = math.nan  # ‖α · step‖
    expected_gain: float = math.nan  # first-order prediction at the accepted α
    gain: float = math.nan  # surrogate improvement found
    quadratic_kl: float = math.nan  # α²δ, the KL the quadratic model predicts
    kl: float = math.nan  # true mean KL
    scale: float = 0.0  # α
    search: LineSearchResult | None = None
    cg: CGSolution | None = None

    @property
    def accepted(self) -> bool:
        return self.outcome is Outcome.ACCEPTED

    @property
    def numerics_failed(self) -> bool:
        """Whether arithmetic broke down, rather than merely this step being of no use.

        F is positive semi-definite: only arithmetic that broke down finds a direction that is not.
        """
        if self.outcome is Outcome.NO_CANDIDATE and self.search is not None:
            return all(rejection is Rejection.NONFINITE for rejection in self.search.rejections)
        return self.outcome in (
            Outcome.NONFINITE_GRADIENT,
            Outcome.NONFINITE_PRODUCT,
            Outcome.NONFINITE_STEP,
            Outcome.NONPOSITIVE_CURVATURE,
        )

    @property
    def reason(self) -> str:
        """The outcome, with what the line search objected to."""
        if self.search is None or not self.search.rejections or self.accepted:
            return str(self.outcome)
        return f"{self.outcome}: last candidate had {self.search.rejections[-1]}"
