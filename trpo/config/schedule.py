"""Values that move with training progress."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, assert_never

from pydantic import Discriminator, Field, Tag, model_validator

from trpo.config.section import Settings, contradiction


class Schedule(Settings):
    """A value that moves from the first update of a run (progress 0) to its last (1): `value_at`."""

    start: float = Field(gt=0, description="Value at the first update.")
    end: float = Field(gt=0, description="Value at the last update.")
    shape: Literal["linear", "cosine", "geometric"] = Field("linear", description="How it moves from start to end.")

    @model_validator(mode="after")
    def _factors_reach_the_end(self) -> Self:
        if self.shape == "geometric" and min(self.start, self.end) <= 0:
            key = "end" if self.end <= 0 else "start"
            raise contradiction(key, "must be above 0 for shape geometric: no factors lead there", against="shape")
        return self


class FractionSchedule(Schedule):
    start: float = Field(ge=0, le=1, description="Value at the first update.")
    end: float = Field(ge=0, le=1, description="Value at the last update.")


class OptionSchedule(Schedule):
    start: float = Field(description="Value at the first update.")
    end: float = Field(description="Value at the last update.")


def is_schedule(option: object) -> bool:
    """Whether one of `env.options` is a schedule, and no other mapping."""
    return isinstance(option, Schedule) or (isinstance(option, dict) and bool({"start", "end"} & option.keys()))


def number_or_schedule(value: object) -> str:
    # Chosen here rather than by trial, so that a mistake is reported once, against what was meant.
    return "schedule" if isinstance(value, dict | Schedule) else "number"


Scheduled = Annotated[
    Annotated[float, Field(gt=0), Tag("number")] | Annotated[Schedule, Tag("schedule")],
    Discriminator(number_or_schedule),
]
ScheduledFraction = Annotated[
    Annotated[float, Field(ge=0, le=1), Tag("number")] | Annotated[FractionSchedule, Tag("schedule")],
    Discriminator(number_or_schedule),
]


def value_at(setting: float | Schedule, progress: float) -> float:
    """The value of a constant or scheduled setting at progress p ∈ [0, 1].

    linear: start + p (end − start); cosine: end + ½ (start − end)(1 + cos πp); geometric: start^(1 − p) end^p.
    """
    if not isinstance(setting, Schedule):
        return setting
    match setting.shape:
        case "linear":
            return setting.start + progress * (setting.end - setting.start)
        case "cosine":
            return setting.end + 0.5 * (setting.start - setting.end) * (1 + math.cos(math.pi * progress))
        case "geometric":
            return float(setting.start ** (1 - progress) * setting.end**progress)
        case _:
            assert_never(setting.shape)


def options_at(options: Mapping[str, Any], progress: float) -> dict[str, Any]:
    """The `env.options` at progress p ∈ [0, 1]: those that are schedules by `value_at`, copies of the others."""
    return {name: _option_at(value, progress) for name, value in options.items()}


def _option_at(value: Any, progress: float) -> Any:
    if not is_schedule(value):
        return copy.deepcopy(value)  # what an environment is given it may change
    schedule = value if isinstance(value, Schedule) else OptionSchedule.model_validate(value)
    # Not by a rounding beyond the end, which may be the largest that an environment takes.
    return schedule.end if progress == 1 else value_at(schedule, progress)


def cooldown(share: float, progress: float) -> float:
    """1 until the last `share` of a run, from there in a straight line to 0.1 at its end (cf. Hägele et al. 2024).

    Args:
        share: in [0, 1]; 0: always 1.
        progress: p ∈ [0, 1].
    """
    left = 1 - progress
    return 1.0 if left >= share else 0.1 + 0.9 * left / share
