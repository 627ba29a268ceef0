"""`TorchEnvs`: environments written in torch, stepped as one batch on the device that holds them."""

from __future__ import annotations

import difflib
import importlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from gymnasium.spaces import Space
from torch import Tensor

from trpo.config import EnvConfig
from trpo.envs.contract import Step, check_env_count
from trpo.envs.spaces import ActionEncoding
from trpo.envs.stagger import first_episode_length
from trpo.envs.torch_classic import TASKS, TorchTask
from trpo.envs.torch_random import stream_keys, uniform
from trpo.errors import EnvError, raised
from trpo.runtime.cuda_graph import Recorded, Tensors, can_record

_log = logging.getLogger(__name__)

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

    def __init__(
        self,
        config: EnvConfig,
        seeds: Sequence[int],
        *,
        device: torch.device,
        on_warning: Callable[[str], None] = _log.warning,
    ) -> None:
        self._id = config.id
        self._on_warning = on_warning
        self._task = task = _task(config)
        self.num_envs = len(seeds)
        self.staggered = config.stagger
        self.device = device = torch.empty(0, device=device).device  # with its number
        self.single_observation_space = task.observation_space
        self.unflattened_observation_space: Space[Any] = task.observation_space
        self.single_action_space = task.action_space
        self._encoding = ActionEncoding.of(task.action_space)
        self._keys = stream_keys(seeds, device)
        self._draws = 0
        self._drawn: Iterator[Tensor] = iter(())  # states of new episodes [S, N], the next ones
        self._state: Tensor | None = None  # [S, N]
        self._steps = torch.zeros(self.num_envs, dtype=torch.int64, device=device)  # of the running episodes
        limits = [first_episode_length(task.time_limit, seed) if config.stagger else task.time_limit for seed in seeds]
        self._limit = torch.tensor(limits, device=device)  # of the running episodes
        self._valid = torch.ones(self.num_envs, dtype=torch.bool, device=device)
        self._low, self._high, self._start = (
            None if values is None else torch.from_numpy(values).to(device)
            for values in (self._encoding.low, self._encoding.high, self._encoding.start)
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
        # New tensors, never changed in place: those there are may be arguments of a recording.
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

    def in_one(self, run: Callable[[], None], steps: int) -> Callable[[], None]:
        """`run`, which calls `step` so many times and does nothing that a graph cannot record, as one graph.

        A device without graphs, or a task that is not pure, gets `run` itself.
        """
        if not (can_record(self.device) and self._task.pure):
            return run

        def whole(first: Tensor, *state: Tensor) -> Tensors:
            self._keys, self._state, self._steps, self._limit = state
            self._drawn = iter(self._new_episodes(first, steps))
            run()
            return self._state, self._steps, self._limit

        def refused(why: str) -> None:
            self._on_warning(
                f"backend torch: what {self._id} does in a step cannot be recorded as a CUDA graph, without which "
                f"rollouts take longer: {why}"
            )

        recorded = Recorded(whole, on_refusal=refused)

        def go() -> None:
            if self._state is None:
                raise RuntimeError("a step before the first reset()")
            draws, keys = self._draws, self._keys
            first = torch.full((), draws, dtype=torch.int64, device=self.device)
            self._state, self._steps, self._limit = recorded(first, keys, self._state, self._steps, self._limit)
            # Python counts no steps of a replay.
            self._draws, self._drawn, self._keys = draws + steps, iter(()), keys

        return go

    def state_dict(self) -> dict[str, Any]:
        """See `BatchEnv.state_dict`."""
        if self._state is None:
            raise RuntimeError("state_dict() before the first reset()")
        # Copies: what a recording returns is written to again.
        state = {"state": self._state, "steps": self._steps, "limit": self._limit}
        return {**{name: x.clone() for name, x in state.items()}, "keys": self._keys, "draws": self._draws}

    def load_state_dict(self, state: dict[str, Any]) -> Tensor:
        """See `BatchEnv.load_state_dict`."""
        check_env_count(state["steps"], self.num_envs)
        if state["state"].shape != (self._task.state_size, self.num_envs):
            raise EnvError("the saved states are of another task: resume with the env.id of the run that wrote them")
        self._state, self._steps, self._limit, self._keys = (
            state[name].to(self.device) for name in ("state", "steps", "limit", "keys")
        )
        self._draws, self._drawn = int(state["draws"]), iter(())
        return self._task.observe(self._state)

    def close(self) -> None:
        """See `BatchEnv.close`; there is nothing to free."""

    def _begin(self) -> Tensor:
        """States [S, N] of new episodes, others at every call."""
        state = next(self._drawn, None)
        if state is None:
            self._drawn = iter(self._new_episodes(self._draws, _DRAWN_AT_ONCE))
            state = next(self._drawn)
        self._draws += 1
        return state

    def _new_episodes(self, first: int | Tensor, count: int) -> Tensors:
        """States [S, N] of the new episodes that the calls `first`, `first` + 1 … of `_begin` want."""
        numbers = uniform(self._keys, first, count, self._task.state_size)
        return self._task.begin(numbers.transpose(0, 1)).transpose(0, 1).unbind()

    def _native(self, action: Tensor) -> Tensor:
        """Actions [N, A] as the task takes them: what `ActionEncoding.native` does, without looking at a value."""
        expected = (self.num_envs, self._encoding.size)
        if action.shape != expected:
            raise EnvError(f"action has shape {tuple(action.shape)}; the environments take {list(expected)}")
        action = action.to(self.device)
        if self._low is not None and self._high is not None:
            clipped = torch.clamp(action, self._low, self._high)
            return (clipped if self._low.is_floating_point() else clipped.round()).to(self._low.dtype)
        return action if self._start is None else action + self._start


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
