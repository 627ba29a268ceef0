"""Policy + environment → episode returns. Always of Gymnasium's own environments, rewards unscaled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gymnasium import spaces

from trpo.config import EnvConfig
from trpo.envs import make_single_env
from trpo.envs.single import close_env
from trpo.errors import EnvError
from trpo.evaluation.episodes import SIDE_BY_SIDE, ActingPolicy, check_spaces, side_by_side
from trpo.evaluation.result import Evaluation
from trpo.evaluation.video import check_recordable, check_showable


def evaluate(
    policy: ActingPolicy,
    env_config: EnvConfig,
    action_space: spaces.Space[Any],
    *,
    episodes: int,
    seed: int,
    deterministic: bool = True,
    max_episode_steps: int = 10_000,
    video: str | Path | None = None,
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
    video = None if video is None else Path(video)
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
        part = side_by_side(
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


def check_environment(policy: ActingPolicy, env_config: EnvConfig, action_space: spaces.Space[Any]) -> None:
    """Raises `EnvError` unless the environment can be built and is the policy's."""
    env = make_single_env(env_config.for_evaluation)
    try:
        check_spaces(policy, env, action_space)
    except EnvError as error:
        if env_config.for_evaluation == env_config:
            raise
        raise EnvError(f"{error}; wrappers that are training_only must leave both spaces as they are") from error
    finally:
        close_env(env)
