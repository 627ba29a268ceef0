"""Values that move with training progress."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

from trpo.config import OptionSchedule, Schedule, is_schedule


def value_at(setting: float | Schedule, progress: float) -> float:
    """The value of a constant or scheduled setting at progress p ∈ [0, 1].

    linear: start + p (end − start); cosine: end + ½ (start − end)(1 + cos πp); geometric: start^(1 − p) end^p.
    """
    if not isinstance(setting, Schedule):
        return setting
    if setting.shape == "linear":
        return setting.start + progress * (setting.end - setting.start)
    if setting.shape == "geometric":
        return float(setting.start ** (1 - progress) * setting.end**progress)
    return setting.end + 0.5 * (setting.start - setting.end) * (1 + math.cos(math.pi * progress))


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
