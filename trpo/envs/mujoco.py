"""`MujocoShard`: Gymnasium's MuJoCo tasks, all stepped in one call, to the same bits as each by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from trpo.config import EnvConfig
from trpo.envs.mujoco_batch import DifferentNumbers, NotHere, Simulations
from trpo.envs.shard import EnvShard
from trpo.envs.single import failure
from trpo.errors import EnvError

_TOLD_AFTER = 256  # steps: a log is told faster of many at once


class MujocoShard(EnvShard):
    """k environments, all rows valid, whose steps `Simulations` take; with backend `auto` only where they can.

    Args:
        config: `workers` threads step the simulations.
        seeds: See `EnvShard`.
        on_warning: Gets a line if the task is known but the installed Gymnasium computes it differently.

    Raises:
        EnvError: As `EnvShard`; with backend `mujoco` also `NotHere`.
    """

    def __init__(self, config: EnvConfig, seeds: Sequence[int], *, on_warning: Callable[[str], None]) -> None:
        super().__init__(config, seeds)
        # Actions that the logs have still to be told, of all environments at once; from which on, of each.
        self._untold = np.empty((_TOLD_AFTER, len(seeds), self._encoding.size), self._encoding.dtype)
        self._count, self._from = 0, [0] * len(seeds)
        self._simulations: Simulations | None = None
        try:
            self._simulations = Simulations.of(config, self._envs[0], len(seeds))
        except BaseException as error:
            if config.backend == "mujoco" or not isinstance(error, NotHere):
                self.close()
                raise
            if isinstance(error, DifferentNumbers):
                on_warning(f"{error}, which is used now")

    def _act(self) -> None:
        if self._simulations is None:
            super()._act()
            return
        buffers = self._buffers
        if self._count == _TOLD_AFTER:
            self._tell()
        self._untold[self._count] = buffers.action
        self._count += 1
        try:
            self._simulations.step(buffers.action, buffers.next_obs, buffers.reward, buffers.terminated)
        except EnvError:
            raise
        except Exception as error:
            i = int(getattr(error, "ids", [0])[0])
            raise failure(self._where(i), error) from error
        limits = np.minimum(self._cut_after, self._simulations.time_limit)
        np.greater_equal(self._episode_steps, limits, out=buffers.truncated)

    def _entered(self, i: int) -> None:
        self._from[i] = self._count  # those before are of an episode that is over
        if self._simulations is not None:
            self._simulations.enter(i, self._envs[i])

    def _tell(self) -> None:
        for i, log in enumerate(self._logs):
            log.extend(self._untold[self._from[i] : self._count, i])
        self._count, self._from = 0, [0] * len(self._logs)

    def state_dict(self) -> list[dict[str, Any]]:
        """See `EnvShard.state_dict`."""
        self._tell()
        return super().state_dict()

    def close(self) -> None:
        """See `EnvShard.close`; ends the threads, too."""
        self._simulations = None
        super().close()
