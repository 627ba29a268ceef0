"""Spaces at the boundary: which are supported, how observations become rows and how actions become the environment's.

Numpy and Gymnasium only: worker processes import this, and torch would cost each of them seconds and memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Space, Tuple
from gymnasium.spaces.utils import flatdim, flatten, flatten_space
from gymnasium.vector.utils import iterate

from trpo.errors import EnvError

Array = np.ndarray[Any, np.dtype[Any]]


def is_flat(space: Space[Any]) -> bool:
    """Whether observations of `space` are rows already: a Box of rank one."""
    return isinstance(space, Box) and len(space.shape) == 1


def check_observation_space(space: Space[Any], env_id: str) -> None:
    """Raises `EnvError` unless Gymnasium flattens `space` to a vector of fixed length that means something."""
    _check_parts(space, env_id)
    if not flatdim(space):
        raise EnvError(f"{env_id} observes a {space}, which has no component: give the policy something to observe")


def _check_parts(space: Space[Any], env_id: str) -> None:
    if isinstance(space, Dict | Tuple):
        for part in space.spaces.values() if isinstance(space, Dict) else space.spaces:
            _check_parts(part, env_id)
    elif not isinstance(space, Box | Discrete | MultiDiscrete | MultiBinary):
        raise EnvError(
            f"{env_id} observes a {type(space).__name__} space, which has no fixed-size vector; supported are Box, "
            "Discrete, MultiDiscrete, MultiBinary, Dict and Tuple: add a wrapper that converts it under env.wrappers"
        )


def row_space(space: Space[Any]) -> Box:
    """The space of the rows handed on: Box [D], float64 where the environment's flat space is float64, else float32."""
    flat = space if is_flat(space) else flatten_space(space)
    assert isinstance(flat, Box)
    if flat.dtype in (np.float32, np.float64):
        return flat
    return Box(flat.low.astype(np.float32), flat.high.astype(np.float32), dtype=np.float32)


def flatten_batch(space: Space[Any], obs: Any, num_envs: int) -> Array:
    """Rows [N, D] of a batch of observations of `space` as a vector environment returns it."""
    if isinstance(space, Box):
        return np.asarray(obs).reshape(num_envs, -1)
    batched = gymnasium.vector.utils.batch_space(space, num_envs)
    return np.stack([np.asarray(flatten(space, row)) for row in iterate(batched, obs)])


@dataclass(frozen=True, slots=True)
class ActionEncoding:
    """The policy's action rows [N, A] ↔ what the environment's action space asks for.

    Box: floats, clipped to the finite bounds here and nowhere else. Discrete, MultiDiscrete: 0-based indices, to which
    the space's `start` is added. MultiBinary: 0 or 1. A is the space's size, 1 for Discrete.
    """

    shape: tuple[int, ...]  # of one action in the environment, () for Discrete
    dtype: np.dtype[Any]
    low: Array | None  # [A] bounds of a Box; None for the others
    high: Array | None
    start: Array | None  # [A] or [1], offset of the indices; None for Box and MultiBinary

    @classmethod
    def of(cls, space: Space[Any], env_id: str = "the environment") -> ActionEncoding:
        """The encoding of `space`; `EnvError` if the space is not supported."""
        if space.shape and 0 in space.shape:
            raise EnvError(f"{env_id} acts in {space}, which has no component: there is nothing to learn")
        if isinstance(space, Box):
            return cls(space.shape, np.dtype(space.dtype), space.low.ravel(), space.high.ravel(), None)
        if isinstance(space, Discrete):
            return cls((), np.dtype(space.dtype), None, None, np.array([space.start], space.dtype))
        if isinstance(space, MultiDiscrete):
            return cls(space.shape, np.dtype(space.dtype), None, None, np.asarray(space.start).ravel())
        if isinstance(space, MultiBinary):
            return cls(space.shape, np.dtype(space.dtype), None, None, None)
        raise EnvError(
            f"{env_id} acts in a {type(space).__name__} space; supported are Box, Discrete, MultiDiscrete and "
            "MultiBinary: add a wrapper that converts it under env.wrappers"
        )

    @property
    def size(self) -> int:
        """A, the width of an action row."""
        return math.prod(self.shape)

    def native(self, action: Array) -> Array:
        """Rows [N, A] in the space's dtype, clipped or shifted; `EnvError` if `action` has another shape or a NaN."""
        if action.ndim != 2 or action.shape[1] != self.size:
            raise EnvError(f"action has shape {action.shape}; the environments take [N, {self.size}]")
        if not np.isfinite(action).all():
            index = int(np.flatnonzero(~np.isfinite(action).all(axis=1))[0])
            raise EnvError(
                f"the action for environment {index} is not finite ({action[index].tolist()}): the policy diverged; "
                "lower natural_gradient.max_kl or check the reward and observation scales"
            )
        if self.low is not None and self.high is not None:
            # An integer Box rounds: a cast alone would make its top value almost unreachable.
            clipped = np.minimum(np.maximum(action, self.low), self.high)  # what np.clip does, in half the time
            return (clipped if self.dtype.kind == "f" else np.rint(clipped)).astype(self.dtype, copy=False)
        return action.astype(self.dtype) if self.start is None else (action + self.start).astype(self.dtype)

    def single(self, row: Array) -> Any:
        """One environment's action from its native row [A]; a copy, since environments may keep or change it."""
        return row[0] if self.shape == () else row.reshape(self.shape).copy()

    def batched(self, native: Array) -> Array:
        """Native rows [N, A] in the shape a vector environment takes."""
        return native.reshape(len(native), *self.shape)
