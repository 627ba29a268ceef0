"""Wrappers for `env.wrappers`."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Dict, Discrete, MultiBinary, MultiDiscrete

from trpo.errors import EnvError


class MaskFromInfo(gymnasium.Wrapper[Any, Any, Any, Any], gymnasium.utils.RecordConstructorArgs):
    """Puts the mask of actions in an environment's `info` into its observation, for `policy.action_mask`.

    Gymnasium's own tasks have theirs in `info`, as `action_space.sample` takes it. Observations become a Dict with
    `observation` and, under the key, one number for each choice.

    Args:
        env: with a Discrete or MultiDiscrete action.
        key: of the mask, in `info` and in observations.

    Raises:
        EnvError: actions of other kinds.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], key: str = "action_mask"):
        gymnasium.utils.RecordConstructorArgs.__init__(self, key=key)
        super().__init__(env)
        space = env.action_space
        if not isinstance(space, Discrete | MultiDiscrete):
            raise EnvError(f"actions are {space}: only choices, of Discrete and MultiDiscrete, can be ruled out")
        choices = space.n if isinstance(space, Discrete) else space.nvec.sum()
        self._key = key
        self.observation_space = Dict({"observation": env.observation_space, key: MultiBinary(int(choices))})

    def reset(self, **options: Any) -> tuple[Any, dict[str, Any]]:
        observation, info = self.env.reset(**options)
        return self._with_mask(observation, info), info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        return self._with_mask(observation, info), reward, terminated, truncated, info

    def _with_mask(self, observation: Any, info: dict[str, Any]) -> dict[str, Any]:
        if self._key not in info:
            raise EnvError(f"info has no {self._key!r}, only {sorted(map(str, info))}")
        # Of MultiDiscrete a mask for each component, itself perhaps a tuple.
        parts = info[self._key] if isinstance(info[self._key], tuple) else (info[self._key],)
        return {"observation": observation, self._key: np.concatenate([np.ravel(part) for part in parts])}
