"""The evaluations of a run, and the policies that it keeps because of them: the best one and the last."""

from __future__ import annotations

import contextlib
import math
from functools import partial
from pathlib import Path
from typing import Any

from gymnasium import spaces

from trpo.config import Config
from trpo.config.difference import same_evaluations
from trpo.errors import CheckpointError
from trpo.evaluation import Evaluation, evaluate
from trpo.evaluation.video import VideoError
from trpo.policy import Policy
from trpo.run.checkpoint import load_state
from trpo.run.directory import RunDirectory
from trpo.run.messages import Messages
from trpo.run.saved_policy import save_policy
from trpo.runtime.random_streams import stream_seed


class Evaluations:
    """Evaluates the policy of a run and saves it, in the process that leads.

    Args:
        config: all settings.
        run: where videos and policies go.
        messages: for what went wrong without ending the run.
        action_space: as the environment declares it.
        observation_space: as the environment declares it, before it is flattened; None if nobody knows.

    Attributes:
        latest: of this run and task; None before the first one.
        best_return: mean return of the policy in `best/`; −∞ before there is one of this task.
    """

    def __init__(
        self,
        config: Config,
        run: RunDirectory,
        messages: Messages,
        *,
        action_space: spaces.Space[Any],
        observation_space: spaces.Space[Any] | None,
    ) -> None:
        self.config = config
        self.run = run
        self.messages = messages
        self.action_space = action_space
        self.observation_space = observation_space
        self.latest: Evaluation | None = None
        self.best_return = -math.inf

    def go_on(self, latest: Evaluation | None, best_return: float) -> None:
        """Takes over what a checkpoint says. A better policy that was saved in `best/` since then is kept."""
        self.latest, self.best_return = latest, best_return
        with contextlib.suppress(CheckpointError, KeyError, TypeError, ValueError):
            state: Any = load_state(self.run.best)
            if same_evaluations(Config.model_validate(state["config"]), self.config):
                self.best_return = max(best_return, float(state["info"]["evaluation"]["eval/mean_reward"]))

    def evaluate(self, policy: Policy, *, episodes: int, env_steps: int) -> Evaluation:
        """Of the policy as it is; a video that cannot be made costs nothing but itself."""
        settings = self.config.evaluation
        run = partial(
            evaluate,
            policy,
            self.config.env,
            self.action_space,
            episodes=episodes,
            seed=stream_seed(self.config.seed, "evaluation"),
            max_episode_steps=settings.max_episode_steps,
        )
        try:
            result = run(video=self.run.videos / f"step-{env_steps:09d}.mp4" if settings.video else None)
        except VideoError as error:
            self.messages.warn(f"this evaluation has no video: {error}")
            result = run()
        if result.cut:
            cut = f"{result.cut} of {episodes} episodes were cut after {max(result.lengths)} steps"
            self.messages.note(f"{cut}, evaluation.max_episode_steps: the environment has no time limit")
        self.latest = result
        return result

    def keep_if_best(self, result: Evaluation, policy: Policy, *, env_steps: int) -> None:
        """Saves the policy with this result as `best/` if no other returned as much."""
        if not result.mean > self.best_return:  # NaN is no best
            return
        try:
            self._save(self.run.best, result, policy, env_steps)
            self.best_return = result.mean
        except CheckpointError as error:
            self.messages.warn(f"the best policy so far was not saved: {error}")

    def keep_last(self, result: Evaluation, policy: Policy, *, env_steps: int) -> None:
        """Saves the policy with this result as `final/`.

        Raises:
            CheckpointError: the disk refuses.
        """
        self._save(self.run.final, result, policy, env_steps)

    def has_last(self, env_steps: int) -> bool:
        """Whether `final/` holds the policy after so many steps: not damaged, nor that of a run since prolonged."""
        if not self.run.final.is_dir():
            return False
        try:
            state: Any = load_state(self.run.final)
            return state["info"]["env_steps"] == env_steps
        except CheckpointError:
            return False

    def _save(self, path: Path, result: Evaluation, policy: Policy, env_steps: int) -> None:
        info = {"env_steps": env_steps, "seed": self.config.seed, "evaluation": result.metrics()}
        save_policy(path, policy, self.config, self.action_space, info, observation_space=self.observation_space)
