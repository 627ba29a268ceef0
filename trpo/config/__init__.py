"""All settings: what there is, read from YAML and written, compared."""

from trpo.config.schedule import FractionSchedule, OptionSchedule, Schedule
from trpo.config.section import Settings
from trpo.config.settings import (
    AdamFitConfig,
    BodyConfig,
    CheckpointConfig,
    Config,
    EnvConfig,
    EvaluationConfig,
    GaeConfig,
    GaussNewtonFitConfig,
    LearnedStdConfig,
    LineSearchConfig,
    NaturalGradientConfig,
    NormalizeConfig,
    PolicyConfig,
    ValueConfig,
    WrapperConfig,
)

__all__ = [
    "AdamFitConfig",
    "BodyConfig",
    "CheckpointConfig",
    "Config",
    "EnvConfig",
    "EvaluationConfig",
    "FractionSchedule",
    "GaeConfig",
    "GaussNewtonFitConfig",
    "LearnedStdConfig",
    "LineSearchConfig",
    "NaturalGradientConfig",
    "NormalizeConfig",
    "OptionSchedule",
    "PolicyConfig",
    "Schedule",
    "Settings",
    "ValueConfig",
    "WrapperConfig",
]
