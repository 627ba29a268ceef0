"""`EnvShard`: some Gymnasium environments stepped in a loop, writing into arrays given to it.

Backends run this code in their own process or in workers, so they cannot differ. Gymnasium's SyncVectorEnv and
AsyncVectorEnv are not used: a killed worker of the latter surfaces as a bare EOFError and close() then hangs, a hung
worker or an exception that cannot be pickled hangs step() for ever, and one process per environment is slow where
environments outnumber cores.

Numpy and Gymnasium only, no torch, to keep worker processes light.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np

from trpo.config import EnvConfig
from trpo.envs.replay import EpisodeLog, ReplayError, begin, needs_fresh_environment, random_state, replay
from trpo.envs.returned import (
    Flattened,
    check_finite,
    flag,
    flat_observation,
    numbers_of,
    scalar_reward,
    success_of,
)
from trpo.envs.single import close_env, failure, make_single_env
from trpo.envs.spaces import ActionEncoding, row_space
from trpo.envs.stagger import NEVER, first_episode_length
from trpo.envs.step_buffers import EnvSpaces, StepBuffers
from trpo.errors import EnvError


class EnvShard:
    """k environments, numbered from `first_index` in messages.

    Environment i is seeded by `seeds[i]` at its first reset only. An episode's end is settled in the same step: the
    final observation goes to `next_obs`, the first of the new episode to `reset_obs`.
    """

    def __init__(self, config: EnvConfig, seeds: Sequence[int], first_index: int = 0) -> None:
        self._config = config
        self._first = first_index
        self._first_seeds = [int(seed) for seed in seeds]
        self._seeds: list[int | None] = [*self._first_seeds]  # of the next reset
        self._envs: list[gymnasium.Env[Any, Any]] = []
        for index in range(len(seeds)):
            try:
                self._envs.append(make_single_env(config))
            except EnvError as error:
                self.close()
                raise EnvError(f"environment {first_index + index}: {error}") from error
        self.spaces = self._common_spaces()
        self._encoding = ActionEncoding.of(self.spaces.action)
        self._declared: Any = self.spaces.declared
        self._fresh_each_episode = needs_fresh_environment(self._envs[0])
        self._logs = [EpisodeLog(self._encoding) for _ in seeds]
        self._episode_steps = np.zeros(len(seeds), np.int64)
        self._cut_after = np.full(len(seeds), NEVER)  # steps of the running episodes
        self._returns = np.zeros(len(seeds))  # of the running episodes, so far
        self._options: dict[str, Any] = {}  # of the next reset

    def _common_spaces(self) -> EnvSpaces:
        found = [_spaces_of(env, len(self._config.info)) for env in self._envs]
        for index, spaces in enumerate(found):
            check_same_spaces(found[0], spaces, self._first, self._first + index)
        return found[0]

    def attach(self, buffers: StepBuffers) -> None:
        """Gives the arrays to read actions from and write to; k rows each."""
        self._buffers = buffers

    def set_options(self, options: dict[str, Any]) -> None:
        """What every `reset` is given as `options` from now on."""
        self._options = options

    def reset(self) -> None:
        """Starts k new episodes; first observations in `reset_obs`."""
        self._check_open()
        for i in range(len(self._envs)):
            self._begin(i)
        self._buffers.valid[:] = True
        self._episode_steps[:] = 0
        self._returns[:] = 0
        check_finite(self._buffers.reset_obs, "a first observation", self._where)

    def step(self) -> None:
        """Takes the actions in the buffers and writes everything else in them; rows that are not `valid` stay."""
        self._check_open()
        buffers = self._buffers
        self._episode_steps += buffers.valid
        buffers.success[:] = np.nan
        buffers.info[:] = np.nan
        self._act()
        check_finite(buffers.reward, "a reward", self._where)
        check_finite(buffers.next_obs, "an observation", self._where)
        np.add(self._returns, buffers.reward, out=self._returns, where=buffers.valid)
        done = buffers.terminated | buffers.truncated
        np.copyto(buffers.reset_obs, buffers.next_obs, where=(buffers.valid & ~done)[:, None])
        if done.any():
            for i in np.flatnonzero(done & buffers.valid).tolist():
                self._begin(i)
            check_finite(buffers.reset_obs, "a first observation of its next episode", self._where)
            self._episode_steps[done] = 0
            self._returns[done] = 0

    def _act(self) -> None:
        """Steps the environments of valid rows, and writes what they return."""
        buffers, i = self._buffers, 0
        try:
            for i, env in enumerate(self._envs):
                if not buffers.valid[i]:
                    continue
                row = buffers.action[i]
                self._logs[i].append(row)
                obs, reward, terminated, truncated, info = env.step(self._encoding.single(row))
                buffers.next_obs[i] = flat_observation(obs, self._declared)
                buffers.reward[i] = scalar_reward(reward)
                terminated, truncated = flag(terminated, "terminated"), flag(truncated, "truncated")
                truncated = truncated or self._episode_steps[i] >= self._cut_after[i]
                buffers.terminated[i], buffers.truncated[i] = terminated, truncated
                if terminated or truncated:
                    buffers.success[i] = success_of(info)
                    if self._config.info:
                        buffers.info[i] = numbers_of(info, self._config.info)
        except (Exception, SystemExit) as error:  # some end the process where a window is closed, or so they mean
            raise failure(self._where(i), error) from error

    def state_dict(self) -> list[dict[str, Any]]:
        """What `load_state_dict` needs, one entry per environment."""
        rows = zip(self._logs, self._buffers.reset_obs, self._returns.tolist(), strict=True)
        return [log.state(obs, total) for log, obs, total in rows]

    def load_state_dict(self, states: Sequence[dict[str, Any]]) -> str | None:
        """Replays each environment's episode; present observations in `reset_obs`.

        Returns:
            None, or why one of them is not where it was: then all have to `begin_anew`.
        """
        for i, (env, state) in enumerate(zip(self._envs, states, strict=True)):
            try:
                if self._fresh_each_episode:
                    env = self._rebuild(i)
                obs = replay(env, self._logs[i], self._encoding, state, self._first + i)
            except ReplayError as error:
                return str(error)
            except EnvError:
                raise
            except (Exception, SystemExit) as error:
                return f"{failure(f'environment {self._first + i}', error)} while its episode was replayed"
            self._buffers.reset_obs[i] = obs
            self._episode_steps[i] = len(state["actions"])
            self._returns[i] = state["return"]
            self._seeds[i] = None
            self._cut_after[i] = self._first_length(i)
            self._entered(i)
        self._buffers.valid[:] = True
        return None

    def begin_anew(self, states: Sequence[dict[str, Any]]) -> None:
        """Starts k new episodes in place of those that `states` describe, with seeds of their own."""
        for i, state in enumerate(states):
            salt = zlib.crc32(np.asarray(state["actions"]).tobytes(), zlib.crc32(np.asarray(state["obs"]).tobytes()))
            self._seeds[i] = restart_seed(self._first_seeds[i], salt)
        self.reset()

    def close(self) -> None:
        """Closes all environments."""
        while self._envs:
            close_env(self._envs.pop())

    def _check_open(self) -> None:
        if not self._envs:
            raise RuntimeError("these environments are closed")

    def _begin(self, i: int) -> None:
        env, seed, rng = self._envs[i], self._seeds[i], None
        try:
            if self._fresh_each_episode and seed is None:
                rng = random_state(env)
                env = self._rebuild(i)
            obs = begin(env, self._logs[i], seed=seed, rng=rng, options=self._options)
            self._buffers.reset_obs[i] = flat_observation(obs, self._declared)
        except (Exception, SystemExit) as error:
            raise failure(f"environment {self._first + i}, in reset,", error) from error
        self._seeds[i] = None
        self._cut_after[i] = self._first_length(i)
        self._entered(i)

    def _entered(self, i: int) -> None:
        """Environment i has come by itself, not by a step of this shard, to where the next step starts."""

    def _first_length(self, i: int) -> int:
        """After how many steps the running episode of environment i is cut, if it is its first: that has a seed."""
        seed, spec = self._logs[i].seed, self._envs[i].spec
        if not self._config.stagger or seed is None or spec is None:
            return NEVER
        return first_episode_length(spec.max_episode_steps, seed)

    def _rebuild(self, i: int) -> gymnasium.Env[Any, Any]:
        close_env(self._envs[i])
        self._envs[i] = make_single_env(self._config)
        return self._envs[i]

    def _where(self, i: int) -> str:
        return f"environment {self._first + i}, step {self._episode_steps[i]} of its episode,"


def restart_seed(seed: int, salt: int) -> int:
    """Seed of an environment that begins anew, from the one it had and what tells this start from others."""
    return int(np.random.SeedSequence([seed, salt]).generate_state(1)[0])


def check_same_spaces(expected: EnvSpaces, found: EnvSpaces, expected_index: int, index: int) -> None:
    """Raises `EnvError` if two environments of a batch differ in their spaces."""
    for what in ("declared", "action"):
        a, b = getattr(expected, what), getattr(found, what)
        if a != b:
            kind = "observation" if what == "declared" else what
            raise EnvError(
                f"environments {expected_index} and {index} have different {kind} spaces, {a} and {b}: all "
                "environments of a batch must agree; remove what is random in env.kwargs or the constructor"
            )


def _spaces_of(env: gymnasium.Env[Any, Any], numbers: int) -> EnvSpaces:
    space = env.observation_space
    unflattened = env.env.observation_space if isinstance(env, Flattened) else space
    return EnvSpaces(row_space(space), space, unflattened, env.action_space, numbers)
