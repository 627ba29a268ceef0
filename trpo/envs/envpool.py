"""`EnvpoolEnvs`: Gymnasium's tasks stepped in C++ threads by the envpool package."""

from __future__ import annotations

import difflib
import importlib
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium.spaces import Box, Discrete, Space
from gymnasium.spaces.utils import flatdim
from torch import Tensor

from trpo.config import EnvConfig
from trpo.envs.contract import Step
from trpo.envs.shard import restart_seed
from trpo.envs.single import close_env, make_single_env
from trpo.envs.spaces import flatten_batch
from trpo.envs.stagger import NEVER, first_episode_length
from trpo.envs.vector import VectorEnvAdapter
from trpo.errors import EnvError
from trpo.runtime.cores import worker_count


class EnvpoolEnvs(VectorEnvAdapter):
    """N environments of envpool; a `BatchEnv`.

    The policy is evaluated in Gymnasium's environment of the same id, so that has to exist with the same spaces; its
    action space is the one handed on, since envpool's MuJoCo actions are float64 where Gymnasium's are float32.

    envpool starts an episode's successor in a step of its own, which is a row of its own here and not valid. Seeds
    belong to environments, so numbers depend neither on the threads nor on how environments are spread over processes.
    A simulator cannot be restored: `load_state_dict` starts new episodes, with seeds of their own. Where an episode
    terminates in its very last step before the time limit, envpool reports a truncation only.

    Raises:
        EnvError: envpool is not installed, has no such task or another one than Gymnasium under that id, or the
            settings name wrappers.
    """

    def __init__(self, config: EnvConfig, seeds: Sequence[int]) -> None:
        self._config = config
        self._seeds = [int(seed) for seed in seeds]
        self.staggered = config.stagger
        super().__init__(_pool(config, self._seeds), info=config.info)
        try:
            self.single_action_space, self._time_limit = _task(config, self._raw_space, self.single_action_space)
        except BaseException:
            self.close()
            raise

    def reset(self) -> Tensor:
        """See `BatchEnv.reset`."""
        obs = super().reset()
        cuts = [first_episode_length(self._time_limit, seed) if self._config.stagger else NEVER for seed in self._seeds]
        self._cut_after = np.array(cuts)
        self._first_steps = 0  # of the first episodes
        return obs

    def step(self, action: Tensor) -> Step:
        """See `BatchEnv.step`."""
        step = super().step(action)
        if (self._cut_after < NEVER).any():
            self._cut_first_episodes()
        return step

    def _cut_first_episodes(self) -> None:
        self._first_steps += 1
        cut = (self._first_steps >= self._cut_after) & ~self._ended
        if cut.any():
            self._buffers.truncated[cut] = True
            pool: Any = self._env  # its `reset` takes the environments to reset
            first_obs, _ = pool.reset(np.flatnonzero(cut))
            self._buffers.reset_obs[cut] = flatten_batch(self._raw_space, first_obs, int(cut.sum()))
        self._cut_after[cut | self._ended] = NEVER

    def state_dict(self) -> dict[str, Any]:
        """How far the run is: enough for other seeds than those it began with."""
        return {"steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> Tensor:
        """Starts new episodes, since nothing can be restored; none of them was in the run before."""
        self._steps = int(state["steps"])
        self._env.close()
        self._env = _pool(self._config, [restart_seed(seed, self._steps) >> 1 for seed in self._seeds])
        return self.reset()


def _pool(config: EnvConfig, seeds: list[int]) -> Any:
    """envpool's vector environment; `seeds` in [0, 2³¹), given here because its `reset` ignores them."""
    try:
        envpool = importlib.import_module("envpool")
    except ImportError as error:
        raise EnvError(f"env.backend envpool needs a package: pip install 'trpo[envpool]' ({error})") from error
    if config.wrappers:
        raise EnvError("env.wrappers: backend envpool takes none; remove them, or set env.backend to gymnasium")
    tasks = envpool.list_all_envs()
    if config.id not in tasks:
        near = difflib.get_close_matches(config.id, tasks, n=3)
        hint = f"did you mean {' or '.join(near)}? Otherwise " if near else ""
        raise EnvError(f"env.id: envpool has no {config.id!r}; {hint}set env.backend to gymnasium")
    threads = worker_count(config.workers, len(seeds))
    try:
        return envpool.make(
            config.id,
            env_type="gymnasium",
            num_envs=len(seeds),
            seed=seeds,
            num_threads=threads,
            # Left alone, two threads may share a core while another is idle. Fewer threads than cores are not ours to
            # place: other processes would put theirs on the same ones.
            thread_affinity_offset=0 if _one_per_core(threads) else -1,
            **config.kwargs,
        )
    except Exception as error:
        raise EnvError(
            f"{config.id} cannot be built by envpool with env.kwargs {config.kwargs}: {type(error).__name__}: {error}"
        ) from error


def _one_per_core(threads: int) -> bool:
    """Whether the machine has as many cores, all of them this process's to use."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    return threads == usable == os.cpu_count()


def _task(config: EnvConfig, observed: Space[Any], acted: Space[Any]) -> tuple[Space[Any], int | None]:
    """Gymnasium's action space and time limit; its spaces have to be those of envpool but for the dtype."""
    env = make_single_env(config)
    close_env(env)
    spec = env.spec
    ours, width = env.action_space, flatdim(env.observation_space)
    if flatdim(observed) != width:
        raise EnvError(
            f"{config.id} observes {flatdim(observed)} numbers in envpool and {width} in Gymnasium, where the policy "
            "is evaluated: set env.backend to gymnasium"
        )
    if not _same_actions(ours, acted):
        raise EnvError(
            f"{config.id} acts in {acted} in envpool and in {ours} in Gymnasium, where the policy is evaluated: set "
            "env.backend to gymnasium"
        )
    return ours, spec.max_episode_steps if spec else None


def _same_actions(a: Space[Any], b: Space[Any]) -> bool:
    if isinstance(a, Discrete) and isinstance(b, Discrete):
        return (a.n, a.start) == (b.n, b.start)
    if isinstance(a, Box) and isinstance(b, Box):
        # Bounds may be of either float type: 0.4 is not the same number in both.
        return a.shape == b.shape and np.allclose(a.low, b.low) and np.allclose(a.high, b.high)
    return False
