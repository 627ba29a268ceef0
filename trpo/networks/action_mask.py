"""Choices that a state rules out, as the environment says in its observation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from gymnasium.spaces import Dict, Space
from gymnasium.spaces.utils import flatdim
from torch import Tensor, nn

from trpo.errors import ConfigError
from trpo.networks.linearization import Factors
from trpo.networks.mlp import MLP, ClosedForm
from trpo.networks.network import BodyAndHead, linearize

FAR = 1e8  # below all other logits: a probability of exactly 0, whose logarithm is finite, so that 0 · log 0 is 0


def mask_columns(space: Space[Any], key: str, sizes: Sequence[int]) -> slice:
    """Where a flat observation has the mask.

    Args:
        space: of observations, as the environment declares it.
        key: of the mask in it.
        sizes: choices of each component of an action.

    Raises:
        ConfigError: the space has no such part, or one of another size.
    """
    parts = space.spaces if isinstance(space, Dict) else {}
    if key not in parts:
        raise ConfigError(f"policy.action_mask: observations are {space}, no Dict that has {key!r}")
    size, choices = flatdim(parts[key]), sum(sizes)
    if size != choices:
        raise ConfigError(
            f"policy.action_mask: {key!r} of an observation has {size} numbers, the actions have {choices} choices; "
            "give one number for each, above 0 where it may be taken"
        )
    names = list(parts)  # in the order of the flat row
    start = sum(flatdim(parts[name]) for name in names[: names.index(key)])
    return slice(start, start + size)


class ActionMask(nn.Module):
    """Logits of a network with those of the choices that a state rules out `FAR` below.

    Their probability is 0, before and after a step, so that KL, Fisher matrix and entropy are those of the choices that
    are left. A component of which nothing is left keeps all of them.
    """

    def __init__(self, network: MLP | BodyAndHead, columns: slice, sizes: Sequence[int]):
        super().__init__()
        self.network = network
        self.columns = columns
        self.sizes = list(sizes)

    def forward(self, obs: Tensor) -> Tensor:
        """[B, D] → logits [B, K]."""
        return self.masked(self.network(obs), obs)

    def masked(self, logits: Tensor, obs: Tensor) -> Tensor:
        """Logits [B, K] for observations [B, D]."""
        allowed = (obs[..., self.columns] > 0).split(self.sizes, -1)
        ruled_out = torch.cat([~part & part.any(-1, keepdim=True) for part in allowed], -1)
        return logits - FAR * ruled_out.to(logits.dtype)

    def linearize(self, obs: Tensor) -> MaskedLinearization:
        """In closed form, on top of the network's linearisation."""
        return MaskedLinearization(self, obs)


class MaskedLinearization:
    """J of an `ActionMask`: the network's, since what is taken off does not depend on θ."""

    @torch.no_grad()
    def __init__(self, head: ActionMask, obs: Tensor):
        self._inner = linearize(head.network, obs)
        self.output = head.masked(self._inner.output, obs)
        self.jvp, self.vjp = self._inner.jvp, self._inner.vjp

    def kronecker_factors(self, u: Tensor) -> list[Factors]:
        assert isinstance(self._inner, ClosedForm)  # the config lets no others be preconditioned
        return self._inner.kronecker_factors(u)
