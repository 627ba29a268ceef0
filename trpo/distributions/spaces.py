"""Which family acts in which action space."""

from __future__ import annotations

import math

import torch
from gymnasium import spaces

from trpo.distributions.bernoulli import Bernoulli
from trpo.distributions.categorical import Categorical
from trpo.distributions.contract import Distribution
from trpo.distributions.gaussian import DiagonalGaussian
from trpo.distributions.ordinal import Ordinal
from trpo.errors import EnvError


def distribution_for(
    space: spaces.Space,
    *,
    bins: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float64,
) -> Distribution:
    """The distribution for an action space: for a Box with finite bounds and `bins` an ordinal one, else a Gaussian.

    Args:
        space: as the environment declares it.
        bins: values of each component of an ordinal policy.
        device: where η will be.
        dtype: what it will be: bounds farther apart than its numbers go are none.

    Raises:
        EnvError: the space is none of Box, Discrete, MultiDiscrete, MultiBinary.
    """
    if isinstance(space, spaces.Box) and bins is not None and _is_bounded(space, dtype):
        return Ordinal(space, bins, device=device)
    if isinstance(space, spaces.Box):
        return DiagonalGaussian(math.prod(space.shape))
    if isinstance(space, spaces.Discrete):
        return Categorical([int(space.n)])
    if isinstance(space, spaces.MultiDiscrete):
        return Categorical(space.nvec.reshape(-1).tolist())
    if isinstance(space, spaces.MultiBinary):
        return Bernoulli(math.prod(space.shape))
    raise EnvError(
        f"action space {type(space).__name__} is not supported; wrap the environment so that it is Box, Discrete, "
        "MultiDiscrete or MultiBinary"
    )


def _is_bounded(space: spaces.Box, dtype: torch.dtype) -> bool:
    low, high = (torch.as_tensor(bound, dtype=torch.float64) for bound in (space.low, space.high))
    return space.is_bounded("both") and bool((high - low).to(dtype).isfinite().all())
