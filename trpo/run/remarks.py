"""What a user may not expect of a run's settings, one line each, to be said at its start."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from gymnasium import spaces

from trpo import native
from trpo.config import Config
from trpo.config.difference import without_effect
from trpo.policy import Policy

IMAGE_SIZE = 64 * 64  # components of an observation that is probably an image, of which these networks know nothing


def remarks(config: Config, policy: Policy, action_space: spaces.Space[Any], *, new: bool) -> Iterator[str]:
    """Of a run with a policy built from `config`; `new`: not resumed, so that its σ is the one it begins with."""
    for idle in without_effect(config):
        yield f"no effect: {idle}"
    starts, last = config.learning_starts, (config.updates - 1) * config.batch_size
    if starts > last:
        yield f"the policy will not learn: the last rollout begins at step {last}, before learning_starts {starts}"
    if policy.device.type == "cpu" and not (native.available() or native.SWITCHED_OFF):
        yield "the compiled part is missing, so updates take longer; reinstall trpo with a C compiler"
    inputs = policy.obs_dim
    if inputs >= IMAGE_SIZE and config.policy.body is None:
        yield (
            f"{inputs} components of an observation all go into one layer; env.wrappers can reduce images, policy.body "
            "and value.body look at them otherwise"
        )
    if new and (odd := _std_beside_bounds(policy, action_space)):
        yield odd


def _std_beside_bounds(policy: Policy, action_space: spaces.Space[Any]) -> str | None:
    """What is odd about the σ of a Gaussian policy beside the bounds of its actions, which an ordinal one knows."""
    std = policy.std()  # NaN for all that is no Gaussian of one σ
    if not isinstance(action_space, spaces.Box) or not math.isfinite(std):
        return None
    half = (action_space.high.astype(np.float64) - action_space.low) / 2
    for i, reach in enumerate(half.ravel().tolist()):
        if reach == math.inf:
            return f"component {i} of the actions has no bounds; its σ is {std:g}, policy.std in the actions' unit"
        if reach > 0 and not reach / 20 <= std <= 20 * reach:
            size = "small" if std < reach else "large"
            return (
                f"the actions' σ of {std:g} is {size} beside the bounds of component {i}, {reach:g} to either side; "
                "set policy.std in the unit of the actions, or let policy.bins be a number"
            )
    return None
