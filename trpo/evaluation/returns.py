"""Policy + environment → episode returns. Always of Gymnasium's own environments, rewards unscaled."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium
import torch
from gymnasium import spaces

from trpo.config import EnvConfig
from trpo.envs import make_single_env
from trpo.envs.mujoco_batch import simulations_beside
from trpo.envs.single import close_env
from trpo.errors import EnvError
from trpo.evaluation.episodes import SIDE_BY_SIDE, Actor, Episode, Together
from trpo.evaluation.video import VideoWriter, check_recordable, check_showable
from trpo.policy import Policy


@dataclass(frozen=True)
class Evaluation:
    """Episode returns (sums of unscaled rewards), lengths in environment steps, and successes where reported."""

    returns: list[float]
    lengths: list[int]
    successes: list[float] = field(default_factory=list)
    cut: int = 0  # episodes that would have gone on: the environment has no time limit
    info: dict[str, list[float]] = field(default_factory=dict)  # by name of `env.info`, where reported

    @property
    def mean(self) -> float:
        return statistics.fmean(self.returns)

    @property
    def std(self) -> float:
        """Population standard deviation over episodes."""
        return statistics.pstdev(self.returns)

    @property
    def median(self) -> float:
        return statistics.median(self.returns)

    @property
    def mean_length(self) -> float:
        return statistics.fmean(self.lengths)

    def metrics(self) -> dict[str, float]:
        """Under the tags sb3 users know."""
        out = {
            "eval/mean_reward": self.mean,
            "eval/std_reward": self.std,
            "eval/median_reward": self.median,
            "eval/mean_ep_length": self.mean_length,
            "eval/episodes": float(len(self.returns)),
        }
        if self.successes:
            out["eval/success_rate"] = statistics.fmean(self.successes)
        out |= {f"eval/info/{name}": statistics.fmean(numbers) for name, numbers in self.info.items() if numbers}
        if self.cut:
            out["eval/cut_episodes"] = float(self.cut)
        return out

    def __str__(self) -> str:
        cut = f", {self.cut} of them cut after {max(self.lengths)} steps" if self.cut else ""
        success = f", success {statistics.fmean(self.successes):.0%}" if self.successes else ""
        info = "".join(f", {name} {statistics.fmean(given):.4g}" for name, given in self.info.items() if given)
        return (
            f"return {self.mean:.1f} ± {self.std:.1f} (median {self.median:.1f}), "
            f"length {self.mean_length:.0f}, {len(self.returns)} episodes{cut}{success}{info}"
        )


def evaluate(
    policy: Policy,
    env_config: EnvConfig,
    action_space: spaces.Space[Any],
    *,
    episodes: int,
    seed: int,
    deterministic: bool = True,
    max_episode_steps: int = 10_000,
    video: Path | None = None,
    render: bool = False,
) -> Evaluation:
    """Runs `episodes` whole episodes, each in a new environment; the first is the same however many follow it.

    Episode i is reset with `seed + i`, draws its action noise from a generator of that seed, and is row i mod
    `SIDE_BY_SIDE` of a forward pass that always has that many rows, since the last bits of a matrix product depend on
    its size. So an episode does not depend on those beside it.

    Args:
        policy: its normaliser is used frozen.
        env_config: `id`, `kwargs`, `options` as they are at the end, and `wrappers` are used, but for those that are
            `training_only`; no more than `num_envs` episodes run side by side.
        action_space: the space the policy was trained for; the environment's must be equal.
        episodes: number of episodes, at least 1.
        seed: of the first episode, not negative.
        deterministic: act by the mode of the policy.
        max_episode_steps: where episodes are cut if the environment has no time limit, lest one never end.
        video: an mp4 file to write the first episode to: the first observation, and one frame a step.
        render: show the episodes in a window, one after the other, at the environment's own pace; not with `video`.

    Raises:
        EnvError: the environment cannot be built, is not the policy's, or fails.
        UserError: there is no screen to show it on, or no window (`render`).
        VideoError: no video can be made.
    """
    if episodes < 1:
        raise ValueError(f"episodes has to be at least 1, not {episodes}")
    if render and video is not None:
        raise ValueError("an environment is shown or recorded, not both")
    env_config = env_config.for_evaluation
    if video is not None:
        check_recordable(env_config)
    if render:
        check_showable(env_config)
    at_once = 1 if render else min(SIDE_BY_SIDE, env_config.num_envs)
    returns: list[float] = []
    lengths: list[int] = []
    successes: list[float] = []
    info: dict[str, list[float]] = {name: [] for name in env_config.info}
    cut = 0
    for first in range(0, episodes, at_once):
        part = _side_by_side(
            policy,
            env_config,
            action_space,
            {i % SIDE_BY_SIDE: seed + i for i in range(first, min(episodes, first + at_once))},
            deterministic=deterministic,
            max_episode_steps=max_episode_steps,
            video=None if first else video,
            render=render,
        )
        returns += part.returns
        lengths += part.lengths
        successes += part.successes
        cut += part.cut
        for name, numbers in info.items():
            numbers += part.info[name]
    return Evaluation(returns, lengths, successes, cut, info)


def check_environment(policy: Policy, env_config: EnvConfig, action_space: spaces.Space[Any]) -> None:
    """Raises `EnvError` unless the environment can be built and is the policy's."""
    env = make_single_env(env_config.for_evaluation)
    try:
        _check_spaces(policy, env, action_space)
    except EnvError as error:
        if env_config.for_evaluation == env_config:
            raise
        raise EnvError(f"{error}; wrappers that are training_only must leave both spaces as they are") from error
    finally:
        close_env(env)


def _side_by_side(
    policy: Policy,
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
        _check_spaces(policy, first, action_space)
        with VideoWriter(video, first) as frames:
            episodes = {row: Episode(env, env_config, seeds[row], max_episode_steps) for row, env in envs.items()}
            simulations = simulations_beside(env_config, first, len(envs))
            together = Together(simulations, envs) if simulations else None
            return _run(Actor(policy, action_space, seeds, deterministic), episodes, frames, together)
    finally:
        for env in envs.values():
            close_env(env)


def _run(actor: Actor, episodes: dict[int, Episode], frames: VideoWriter, together: Together | None) -> Evaluation:
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


def _check_spaces(policy: Policy, env: gymnasium.Env[Any, Any], action_space: spaces.Space[Any]) -> None:
    obs_dim = policy.normalizer.moments.mean.shape[0]
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
