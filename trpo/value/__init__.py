"""The value function V(s), the two ways it is fitted to return targets, and its average over updates."""

from trpo.value.adam import AdamFit
from trpo.value.fit import FitReport, ValueFit
from trpo.value.function import AverageValue, ValueFunction, build_value, explained_variance, mean_squared_error
from trpo.value.gauss_newton import GaussNewtonFit

__all__ = [
    "AdamFit",
    "AverageValue",
    "FitReport",
    "GaussNewtonFit",
    "ValueFit",
    "ValueFunction",
    "build_value",
    "explained_variance",
    "mean_squared_error",
]
