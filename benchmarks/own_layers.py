"""For `devices.py`: layers of one's own, as settings name them, and pictures to look at."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from torch import nn


class Pictures(gymnasium.Env[np.ndarray, np.ndarray]):
    """One-channel pictures of 64 x 64 to look at; nothing is to be learnt."""

    observation_space = gymnasium.spaces.Box(0, 255, (64, 64), np.uint8)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,))

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        return self._picture(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        return self._picture(), -float(action[0] ** 2), False, False, {}

    def _picture(self) -> np.ndarray:
        return self.np_random.integers(0, 256, (64, 64), np.uint8)


def dense(inputs: int) -> nn.Module:
    """What the default network is, as layers of one's own."""
    return nn.Sequential(nn.Linear(inputs, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh())


def convolutions(inputs: int) -> nn.Module:
    """[B, 4096] → [B, 256]."""
    first, second = nn.Conv2d(1, 16, 8, stride=4), nn.Conv2d(16, 32, 4, stride=2)
    seen = nn.Sequential(nn.Unflatten(1, (1, 64, 64)), first, nn.Tanh(), second, nn.Tanh(), nn.Flatten())
    return nn.Sequential(seen, nn.Linear(1152, 256), nn.Tanh())


gymnasium.register("Pictures-v0", Pictures, max_episode_steps=1000)
