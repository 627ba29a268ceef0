"""What a fit of V is asked for, and what it reports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from trpo.value.function import ValueFunction


@dataclass(frozen=True, slots=True)
class FitReport:
    """How a fit went; losses are mean squared errors over the whole batch, before and after."""

    loss_before: float
    loss_after: float
    steps: int  # tried, the refused ones included
    refused: int  # steps undone because a value was not finite or the loss did not fall
    nonfinite: bool = False  # whether NaN or infinity was why


class ValueFit(Protocol):
    """A way to move V towards targets. State (moments, if any) survives from update to update and is checkpointed."""

    def fit(self, value: ValueFunction, obs: Tensor, target: Tensor, *, progress: float) -> FitReport:
        """Fits V(obs [B, D]) to target [B]; `progress` ∈ [0, 1] drives schedules."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...
