"""`StepBuffers`: the arrays that a step is read from and written to, in this process or in memory it shares.

Numpy and Gymnasium only, no torch, to keep worker processes light.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from gymnasium.spaces import Box, Space

from trpo.envs.spaces import ActionEncoding, Array

_ALIGNMENT = 64  # bytes: a cache line, so that no two arrays share one


@dataclass(frozen=True, slots=True)
class EnvSpaces:
    """The spaces all environments of a batch share."""

    observation: Box  # [D], as handed on
    declared: Space[Any]  # as the environment declares it; of an `EnvShard` a flat Box
    unflattened: Space[Any]  # as it is before any flattening
    action: Space[Any]
    numbers: int = 0  # of `env.info`


@dataclass(frozen=True, slots=True)
class StepBuffers:
    """The arrays of one step of N environments, in one block of memory (see `trpo.envs.contract.Step`)."""

    action: Array  # [N, A] native: clipped, in the action space's dtype
    next_obs: Array  # [N, D]
    reset_obs: Array  # [N, D]
    reward: Array  # [N] float64
    terminated: Array  # [N] bool
    truncated: Array  # [N] bool
    valid: Array  # [N] bool
    success: Array  # [N] float64
    info: Array  # [N, I] float64

    @staticmethod
    def _layout(spaces: EnvSpaces, num_envs: int) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
        encoding, obs = ActionEncoding.of(spaces.action), spaces.observation
        rows = (num_envs, *obs.shape)
        flags = dict.fromkeys(("terminated", "truncated", "valid"), ((num_envs,), np.dtype(bool)))
        return {
            "action": ((num_envs, encoding.size), encoding.dtype),
            "next_obs": (rows, np.dtype(obs.dtype)),
            "reset_obs": (rows, np.dtype(obs.dtype)),
            "reward": ((num_envs,), np.dtype(np.float64)),
            **flags,
            "success": ((num_envs,), np.dtype(np.float64)),
            "info": ((num_envs, spaces.numbers), np.dtype(np.float64)),
        }

    @classmethod
    def nbytes(cls, spaces: EnvSpaces, num_envs: int) -> int:
        """Size of the block of memory that `over` needs."""
        return sum(_aligned(shape, dtype) for shape, dtype in cls._layout(spaces, num_envs).values())

    @classmethod
    def over(cls, memory: Any, spaces: EnvSpaces, num_envs: int) -> StepBuffers:
        """Arrays over `memory`, a writable buffer of at least `nbytes`."""
        arrays, offset = {}, 0
        for name, (shape, dtype) in cls._layout(spaces, num_envs).items():
            arrays[name] = np.ndarray(shape, dtype, buffer=memory, offset=offset)
            offset += _aligned(shape, dtype)
        return cls(**arrays)

    @classmethod
    def allocate(cls, spaces: EnvSpaces, num_envs: int) -> StepBuffers:
        """Arrays of this process alone."""
        return cls.over(np.zeros(cls.nbytes(spaces, num_envs), np.uint8).data, spaces, num_envs)

    def rows(self, start: int, stop: int) -> StepBuffers:
        """Views of the rows of environments start … stop - 1."""
        return StepBuffers(*(getattr(self, name)[start:stop] for name in self.__slots__))


def _aligned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    size = int(np.prod(shape, dtype=int)) * dtype.itemsize
    return -(-size // _ALIGNMENT) * _ALIGNMENT
