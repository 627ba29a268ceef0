"""`GymnasiumEnvs`: Gymnasium environments stepped in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trpo.config import EnvConfig
from trpo.envs.contract import NEW_EPISODES, Step, check_env_count, native_actions
from trpo.envs.mujoco import MujocoShard
from trpo.envs.shard import EnvShard
from trpo.envs.spaces import ActionEncoding
from trpo.envs.step_buffers import StepBuffers


class GymnasiumEnvs:
    """N Gymnasium environments in this process; a `BatchEnv`.

    With backend `gymnasium` they are stepped one after the other; with `mujoco` in one call, by MuJoCo's threads, and
    with `auto` so where that can be: the numbers are the same.

    The same tensors come back from every `step`: views of arrays written in place, valid until the next call.
    """

    def __init__(
        self, config: EnvConfig, seeds: Sequence[int], *, on_warning: Callable[[str], None] = lambda _: None
    ) -> None:
        self._on_warning = on_warning
        in_turn = config.backend == "gymnasium"
        self._shard = EnvShard(config, seeds) if in_turn else MujocoShard(config, seeds, on_warning=on_warning)
        spaces = self._shard.spaces
        self.num_envs = len(seeds)
        self.staggered = config.stagger
        self.device = torch.device("cpu")
        self.single_observation_space = spaces.observation
        self.unflattened_observation_space = spaces.unflattened
        self.single_action_space = spaces.action
        self._encoding = ActionEncoding.of(spaces.action)
        self._buffers = StepBuffers.allocate(spaces, self.num_envs)
        self._shard.attach(self._buffers)
        self._step = Step.over(self._buffers)
        self.exact_resume = True

    def set_options(self, options: dict[str, Any]) -> None:
        """See `BatchEnv`."""
        self._shard.set_options(options)

    def reset(self) -> Tensor:
        """See `BatchEnv.reset`."""
        self._shard.reset()
        return self._step.reset_obs

    def step(self, action: Tensor) -> Step:
        """See `BatchEnv.step`."""
        np.copyto(self._buffers.action, native_actions(self._encoding, action, self.num_envs))
        self._shard.step()
        return self._step

    def state_dict(self) -> dict[str, Any]:
        """See `BatchEnv.state_dict`; one entry per environment, the same whichever backend wrote it."""
        return {"envs": self._shard.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> Tensor:
        """See `BatchEnv.load_state_dict`."""
        check_env_count(state["envs"], self.num_envs)
        problem = self._shard.load_state_dict(state["envs"])
        self.exact_resume = problem is None
        if problem is not None:
            self._on_warning(NEW_EPISODES.format(problem))
            self._shard.begin_anew(state["envs"])
        return self._step.reset_obs

    def close(self) -> None:
        """See `BatchEnv.close`."""
        self._shard.close()
