"""`TorchEnvs`: environments written in torch, stepped as one batch on the device that holds them."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Sequence
from typing import Any

import torch
from gymnasium.spaces import Box, Space
from torch import Tensor

from trpo.config import EnvConfig
from trpo.envs.contract import Step, check_env_count
from trpo.envs.spaces import ActionEncoding
from trpo.envs.stagger import first_episode_length
from trpo.envs.torch_classic import TASKS, TorchTask
from trpo.envs.torch_random import stream_keys, uniform
from trpo.errors import EnvError, raised

_DRAWN_AT_ONCE = 16  # steps for which new episodes are drawn together: a kernel started, not its work, is what costs


class TorchEnvs:
    """N environments of a `TorchTask` on any device; a `BatchEnv`.

    Neither `reset` nor `step` waits for the device: Python sees no value of a tensor. Each step draws a new episode for
    every environment, whether it ends one or not, and `torch.where` takes it where one ended. Environment i depends on
    `seeds[i]` and the number of steps alone, not on the device or on the environments beside it.

    For the same reason actions and results are not checked here for being finite: the collector does so once a rollout.

    Raises:
        EnvError: No such task in torch, or settings that only Gymnasium's environments know.
    """

    exact_resume = True

    def __init__(self, config: EnvConfig, seeds: Sequence[int], *, device: torch.device) -> None:
        self._task = task = _task(config)
        self.num_envs = len(seeds)
        self.device = device
        self.single_observation_space = task.observation_space
        self.unflattened_observation_space: Space[Any] = task.observation_space
        self.single_action_space = task.action_space
        self._encoding = ActionEncoding.of(task.action_space)
        self._keys = stream_keys(seeds, device)
        self._draws = 0
        self._drawn: Tensor | None = None  # [_DRAWN_AT_ONCE, S, N] states of new episodes
        self._state: Tensor | None = None  # [S, N]
        self._steps = torch.zeros(self.num_envs, dtype=torch.int64, device=device)  # of the running episodes
        limits = [first_episode_length(task.time_limit, seed) if config.stagger else task.time_limit for seed in seeds]
        self._limit = torch.tensor(limits, device=device)  # of the running episodes
        self._valid = torch.ones(self.num_envs, dtype=torch.bool, device=device)
        if isinstance(task.action_space, Box):
            self._low, self._high = (
                torch.from_numpy(bound.ravel()).to(device) for bound in (task.action_space.low, task.action_space.high)
            )

    def reset(self) -> Tensor:
        """See `BatchEnv.reset`."""
        self._state = self._begin()
        self._steps = torch.zeros_like(self._steps)
        return self._task.observe(self._state)

    def step(self, action: Tensor) -> Step:
        """See `BatchEnv.step`."""
        if self._state is None:
            raise RuntimeError("step() before the first reset()")
        state, reward, terminated = self._task.advance(self._state, self._native(action))
        steps = self._steps + 1
        truncated = steps >= self._limit
        done = terminated | truncated
        # New tensors, never changed in place, so that a `state_dict` stays what it was.
        self._state = torch.where(done, self._begin(), state)
        self._steps = steps.masked_fill_(done, 0)
        self._limit = self._limit.masked_fill(done, self._task.time_limit)
        return Step(
            next_obs=self._task.observe(state),
            reset_obs=self._task.observe(self._state),
            reward=reward,
            terminated=terminated,
            truncated=truncated,
            valid=self._valid,
        )

    def state_dict(self) -> dict[str, Any]:
        """See `BatchEnv.state_dict`."""
        if self._state is None:
            raise RuntimeError("state_dict() before the first reset()")
        return {
            "state": self._state,
            "steps": self._steps,
            "limit": self._limit,
            "keys": self._keys,
            "draws": self._draws,
        }

    def load_state_dict(self, state: dict[str, Any]) -> Tensor:
        """See `BatchEnv.load_state_dict`."""
        check_env_count(state["steps"], self.num_envs)
        if state["state"].shape != (self._task.state_size, self.num_envs):
            raise EnvError("the saved states are of another task: resume with the env.id of the run that wrote them")
        self._state, self._steps, self._limit, self._keys = (
            state[name].to(self.device) for name in ("state", "steps", "limit", "keys")
        )
        self._draws, self._drawn = int(state["draws"]), None
        return self._task.observe(self._state)

    def close(self) -> None:
        """See `BatchEnv.close`; there is nothing to free."""

    def _begin(self) -> Tensor:
        """States [S, N] of new episodes, others at every call."""
        block, row = divmod(self._draws, _DRAWN_AT_ONCE)
        if self._drawn is None or row == 0:
            numbers = uniform(self._keys, block * _DRAWN_AT_ONCE, _DRAWN_AT_ONCE, self._task.state_size)
            self._drawn = self._task.begin(numbers.transpose(0, 1)).transpose(0, 1)
        self._draws += 1
        return self._drawn[row]

    def _native(self, action: Tensor) -> Tensor:
        """Actions [N, A] as the task takes them: clipped to a Box, in the space's dtype."""
        expected = (self.num_envs, self._encoding.size)
        if action.shape != expected:
            raise EnvError(f"action has shape {tuple(action.shape)}; the environments take {list(expected)}")
        action = action.to(self.device)
        if isinstance(self.single_action_space, Box):
            return torch.clamp(action, self._low, self._high).to(self._low.dtype)
        return action


def _task(config: EnvConfig) -> TorchTask:
    module, _, name = config.id.rpartition(":")
    if module:  # which may have put a task of its own there
        try:
            importlib.import_module(module)
        except Exception as error:
            raise EnvError(f"env.id: the module {module!r} cannot be imported: {raised(error)}") from error
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=1)
        hint = f"did you mean {near[0]}? Otherwise " if near else ""
        there_is = " and ".join(TASKS)
        raise EnvError(
            f"env.id: backend torch has no {config.id!r}, only {there_is}; {hint}set env.backend to gymnasium"
        )
    for key in ("kwargs", "wrappers", "info"):
        if getattr(config, key):
            raise EnvError(f"env.{key}: backend torch takes none; remove them, or set env.backend to gymnasium")
    return TASKS[name]
