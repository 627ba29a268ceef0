"""Staggered starts: environments whose episodes all have one length should not run in step.

Started together, N environments that never end early reach every phase of an episode together. Each batch then shows
one phase only, and policy and value function are pulled to and fro between them. So the first episode of each
environment is truncated at a step of its own; from then on the batches are alike.

Numpy only: worker processes import this.
"""

from __future__ import annotations

import sys

import numpy as np

NEVER = sys.maxsize


def first_episode_length(time_limit: int | None, seed: int) -> int:
    """Steps in 1 … `time_limit` after which the episode begun with `seed` is truncated; `NEVER` without a limit."""
    if time_limit is None:
        return NEVER
    return 1 + int(np.random.default_rng([seed, time_limit]).integers(time_limit))
