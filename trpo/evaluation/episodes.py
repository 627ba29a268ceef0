"""Episodes of a policy side by side, each as if it were alone."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from trpo.config import EnvConfig
from trpo.config.schedule import options_at
from trpo.envs import make_single_env
from trpo.envs.mujoco_batch import Simulations, simulations_beside
from trpo.envs.returned import ReturnError, flag, flat_observation, numbers_of, scalar_reward, success_of
from trpo.envs.single import close_env, failure
from trpo.envs.spaces import ActionEncoding
from trpo.errors import EnvError
from trpo.evaluation.result import Evaluation
from trpo.evaluation.video import VideoWriter

SIDE_BY_SIDE = 32  # rows of every forward pass, and the most episodes run together


class ActingPolicy(Protocol):
    """What of a policy an evaluation asks for."""

    @property
    def obs_dim(self) -> int:
        """D, the length of a flat observation."""

    @property
    def device(self) -> torch.device:
        """Where observations are wanted."""

    def mode(self, obs: Tensor) -> Tensor:
        """Raw observations [N, D] → the actions without noise [N, A], in the policy's encoding."""

    def sample(self, obs: Tensor, noise: Tensor) -> Tensor:
        """Raw observations [N, D] and rows of `noise` [N, …] → actions [N, A]."""

    def noise(self, *, generator: torch.Generator) -> Tensor:
        """Of one row of `sample`, on the CPU."""


def side_by_side(
    policy: ActingPolicy,
    env_config: EnvConfig,
    action_space: spaces.Space[Any],
    seeds: dict[int, int],
    *,
    deterministic: bool,
    max_episode_steps: int,
    video: Path | None,
    render: bool,
) -> Evaluation:
    """Episodes with `seeds` by the rows of the forward pass that are theirs; a video is of row 0."""
    envs: dict[int, gymnasium.Env[Any, Any]] = {}
    try:
        for row in seeds:
            mode = "human" if render else "rgb_array" if video and row == 0 else None
            envs[row] = make_single_env(env_config, render_mode=mode)
        first = next(iter(envs.values()))
        check_spaces(policy, first, action_space)
        with VideoWriter(video, first) as frames:
            episodes = {row: _Episode(env, env_config, seeds[row], max_episode_steps) for row, env in envs.items()}
            simulations = simulations_beside(env_config, first, len(envs))
            together = _Together(simulations, envs) if simulations else None
            return _run(_Actor(policy, action_space, seeds, deterministic), episodes, frames, together)
    finally:
        for env in envs.values():
            close_env(env)


def _run(actor: _Actor, episodes: dict[int, _Episode], frames: VideoWriter, together: _Together | None) -> Evaluation:
    rows = torch.zeros(SIDE_BY_SIDE, actor.obs_dim, dtype=torch.float64)
    obs = rows.numpy()
    for row, episode in episodes.items():
        obs[row] = episode.reset()
        if together:
            together.enter(row, episode.env)
    frames.capture()
    running = list(episodes)
    while running:
        actions = actor(rows, running)
        outcomes = together.step(actions) if together else {}
        for row in running:
            obs[row] = episodes[row].step(actions[row], outcomes.get(row))
            if row == 0:
                frames.capture()
        running = [row for row in running if not episodes[row].over]
    done = episodes.values()
    return Evaluation(
        [episode.total for episode in done],
        [episode.length for episode in done],
        [episode.success for episode in done if not math.isnan(episode.success)],
        sum(episode.cut for episode in done),
        {
            name: [number for episode in done if not math.isnan(number := episode.info[name])]
            for name in next(iter(done)).info
        },
    )


_Outcome = tuple[Any, Any, Any, Any, dict[str, Any]]  # what an environment's `step` returns


class _Together:
    """Takes the steps of all episodes at once, with the same numbers as one after the other."""

    def __init__(self, simulations: Simulations, envs: dict[int, gymnasium.Env[Any, Any]]):
        first = next(iter(envs.values()))
        shapes: tuple[Any, Any] = first.action_space.shape, first.observation_space.shape
        self._simulations = simulations
        self._number = {row: i for i, row in enumerate(envs)}
        self._action = np.zeros((len(envs), *shapes[0]), first.action_space.dtype)
        self._obs = np.zeros((len(envs), *shapes[1]))
        self._reward = np.zeros(len(envs))
        self._terminated = np.zeros(len(envs), bool)
        self._steps = 0

    def enter(self, row: int, env: gymnasium.Env[Any, Any]) -> None:
        """The episode of `row` has begun in `env`."""
        self._simulations.enter(self._number[row], env)

    def step(self, actions: dict[int, Any]) -> dict[int, _Outcome]:
        """What each environment would return for its action."""
        numbers = [self._number[row] for row in actions]
        self._action[numbers] = list(actions.values())
        try:
            self._simulations.step(self._action, self._obs, self._reward, self._terminated, only=np.array(numbers))
        except EnvError:
            raise
        except Exception as error:
            raise failure(f"the environment, {self._steps} steps into its episodes,", error) from error
        self._steps += 1
        truncated = self._steps >= self._simulations.time_limit
        return {
            row: (self._obs[i], self._reward[i], self._terminated[i], truncated, {})
            for row, i in zip(actions, numbers, strict=True)
        }


class _Episode:
    """One episode of one environment, its reward summed."""

    def __init__(self, env: gymnasium.Env[Any, Any], config: EnvConfig, seed: int, max_steps: int):
        self.env = env
        self.seed = seed
        self.options = options_at(config.options, 1.0)
        self._space: Any = env.observation_space
        has_time_limit = env.spec is not None and env.spec.max_episode_steps is not None
        self.max_steps = math.inf if has_time_limit else max_steps
        self.total = 0.0
        self.length = 0
        self.over = False
        self.cut = False
        self.success = math.nan  # where the environment does not report it
        self.info = dict.fromkeys(config.info, math.nan)

    def reset(self) -> Any:
        """First observation [D]."""
        with self._raising_one_kind():
            obs, _ = self.env.reset(seed=self.seed, options=self.options or None)
            return self._observation(obs)

    def step(self, action: Any, outcome: _Outcome | None = None) -> Any:
        """Next observation [D]; `outcome`: of the step, if it has been taken elsewhere."""
        with self._raising_one_kind():
            obs, reward, terminated, truncated, info = outcome or self.env.step(action)
            self.length += 1
            self.total += self._finite("reward", scalar_reward(reward))
            # Both, whatever the first one is: each has to be one.
            ended = any([flag(terminated, "terminated"), flag(truncated, "truncated")])
            self.cut = not ended and self.length >= self.max_steps
            self.over = ended or self.cut
            if self.over:
                self.success = success_of(info)
                self.info = dict(zip(self.info, numbers_of(info, [*self.info]), strict=True))
            return self._observation(obs)

    @contextlib.contextmanager
    def _raising_one_kind(self) -> Iterator[None]:
        try:
            yield
        except (Exception, SystemExit) as error:  # whatever an environment raises
            raise failure(
                f"the environment, {self.length} steps into the episode with seed {self.seed},", error
            ) from error

    def _observation(self, obs: Any) -> Any:
        return self._finite("observation", flat_observation(obs, self._space))

    def _finite(self, what: str, value: Any) -> Any:
        if not np.isfinite(value).all():
            problem = "the simulation diverged or the environment divides by zero"
            raise ReturnError(f"gave an infinite or undefined {what}: {problem}")
        return value


class _Actor:
    """Observations → actions as the environment takes them, each row by itself."""

    def __init__(
        self, policy: ActingPolicy, action_space: spaces.Space[Any], seeds: dict[int, int], deterministic: bool
    ):
        self.policy = policy
        self.obs_dim = policy.obs_dim
        self.encoding = ActionEncoding.of(action_space)
        self.generators = (
            None if deterministic else {row: torch.Generator().manual_seed(seed) for row, seed in seeds.items()}
        )

    def __call__(self, obs: Tensor, running: list[int]) -> dict[int, Any]:
        """Raw observations [SIDE_BY_SIDE, D] → the actions of the rows `running`."""
        obs = obs.to(self.policy.device)
        if self.generators is None:
            encoded = self.policy.mode(obs)
        else:
            encoded = self.policy.sample(obs, self._noise(self.generators, running))
        native = self.encoding.native(encoded.cpu().numpy()[running])
        return {row: self.encoding.single(action) for row, action in zip(running, native, strict=True)}

    def _noise(self, generators: dict[int, torch.Generator], running: list[int]) -> Tensor:
        """[SIDE_BY_SIDE, Z]; ones where nothing runs."""
        drawn = torch.stack([self.policy.noise(generator=generators[row]) for row in running])
        noise = drawn.new_ones(SIDE_BY_SIDE, drawn.shape[1])
        noise[running] = drawn
        return noise


def check_spaces(policy: ActingPolicy, env: gymnasium.Env[Any, Any], action_space: spaces.Space[Any]) -> None:
    """Raises `EnvError` unless the environment is the policy's."""
    obs_dim = policy.obs_dim
    if env.observation_space.shape != (obs_dim,):
        raise EnvError(
            f"the environment's observations have shape {env.observation_space.shape}, the policy was trained on "
            f"{(obs_dim,)}; give the environment it was trained on"
        )
    if env.action_space != action_space:
        raise EnvError(
            f"the environment's action space {env.action_space} is not the policy's {action_space}; give the "
            "environment it was trained on"
        )
