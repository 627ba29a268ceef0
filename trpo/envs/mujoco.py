"""`MujocoEnvs`: Gymnasium's MuJoCo tasks, all stepped in one call, to the same bits as each by itself."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trpo.config import EnvConfig
from trpo.envs.gymnasium import GymnasiumEnvs
from trpo.envs.mujoco_batch import Simulations
from trpo.envs.shard import EnvShard
from trpo.errors import EnvError


class MujocoEnvs(GymnasiumEnvs):
    """N environments of a MuJoCo task of Gymnasium, on `config.workers` threads; a `BatchEnv`.

    Numbers, states and messages are those of `GymnasiumEnvs`, whatever the number of threads.

    Raises:
        EnvError: As `Simulations` does, `DifferentNumbers` among them.
    """

    def _shard_of(self, config: EnvConfig, seeds: Sequence[int]) -> EnvShard:
        return MujocoShard(config, seeds)


class MujocoShard(EnvShard):
    """k environments whose `Simulations` take their steps; all rows are valid."""

    def __init__(self, config: EnvConfig, seeds: Sequence[int]) -> None:
        super().__init__(config, seeds)
        try:
            self._simulations = Simulations.of(config, self._envs[0], len(seeds))
        except BaseException:
            self.close()
            raise

    def _act(self) -> None:
        buffers = self._buffers
        for log, row in zip(self._logs, buffers.action, strict=True):
            log.append(row)
        try:
            self._simulations.step(buffers.action, buffers.next_obs, buffers.reward, buffers.terminated)
        except RuntimeError as error:
            i = int(getattr(error, "ids", [0])[0])
            raise EnvError(f"{self._where(i)} raised {type(error).__name__}: {error}") from error
        limits = np.minimum(self._cut_after, self._simulations.time_limit)
        np.greater_equal(self._episode_steps, limits, out=buffers.truncated)

    def _entered(self, i: int) -> None:
        self._simulations.enter(i, self._envs[i])
