"""Statistics over seeds: few runs, far from normal."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

RESAMPLES = 2000


def interquartile_mean(scores: Array) -> float:
    """Mean of the middle half of the scores [S] (Agarwal et al. 2021, §4.3), in parts where 4 does not divide S."""
    ordered = np.sort(np.asarray(scores, dtype=float))
    n = len(ordered)
    left = np.arange(n) / n
    weight = np.clip(np.minimum(left + 1 / n, 0.75) - np.maximum(left, 0.25), 0, None)
    return float((weight * ordered).sum() / weight.sum())


def bootstrap_interval(values: Array, *, coverage: float = 0.95) -> tuple[Array, Array]:
    """Percentile bootstrap interval of the mean over seeds, the same at every call.

    Args:
        values: [S, G], S seeds at G steps. A seed is drawn as a whole, since its points depend on each other.
        coverage: probability inside the interval, in (0, 1), of many seeds; of few the interval is too narrow: of
            normal scores 95 % are 75 of 3 seeds, 85 of 5 and 90 of 10.
    """
    seeds = values.shape[0]
    counts = np.random.default_rng(0).multinomial(seeds, np.full(seeds, 1 / seeds), size=RESAMPLES)  # [R, S]
    tail = (1 - coverage) / 2
    low, high = np.quantile(counts @ values / seeds, [tail, 1 - tail], axis=0)
    return low, high
