"""Stands in for the envpool package: Gymnasium's environments behind its interface, with its peculiarities.

As measured with envpool 1.2.5: `observation_space` and `action_space` are those of one environment; MuJoCo actions are
float64; seeds are given to `make`, and `reset` ignores them; rewards are float32; the step after an episode's end is a
reset that takes no action and earns nothing; an end at the time limit is always a truncation; a diverged simulation
gives a NaN reward with finite observations. Results are overwritten by the next step, which envpool does not promise
not to do.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Discrete, Space
from gymnasium.vector import AutoresetMode, VectorEnv

TASKS = [
    "CartPole-v1", "Pendulum-v1", "FrozenLake8x8-v1", "Hopper-v4", "Hopper-v5", "Acrobot-v1", "MountainCar-v0",
    "OnlyHere-v0",
]  # fmt: skip
OTHER_SPACES: dict[str, dict[str, Space[Any]]] = {  # where envpool and Gymnasium mean different tasks by an id
    "Acrobot-v1": {"observation": Box(-1, 1, (7,), np.float32)},
    "MountainCar-v0": {"action": Discrete(4)},
}
made: list[FakePool] = []  # all pools, in order


def list_all_envs() -> list[str]:
    return TASKS


def make(
    task_id: str,
    env_type: str,
    *,
    num_envs: int,
    seed: list[int],
    num_threads: int,
    thread_affinity_offset: int = -1,
    frame_skip: int = 1,
) -> FakePool:
    assert env_type == "gymnasium" and task_id in TASKS and len(seed) == num_envs
    assert all(-(2**31) <= s < 2**31 for s in seed)  # else envpool refuses
    pool = FakePool(task_id, seed, num_threads)
    pool.pinned = thread_affinity_offset == 0
    made.append(pool)
    return pool


class FakePool(VectorEnv[Any, Any, Any]):
    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012
    pinned = False  # whether thread i is kept to core i
    nan_reward_at = 0  # step at which environment 1 diverges

    def __init__(self, task_id: str, seeds: list[int], num_threads: int) -> None:
        self.num_envs, self.seeds, self.num_threads = len(seeds), seeds, num_threads
        self.singles = [gymnasium.make(task_id if task_id != "OnlyHere-v0" else "CartPole-v1") for _ in seeds]
        other = OTHER_SPACES.get(task_id, {})
        self.observation_space = other.get("observation", self.singles[0].observation_space)
        action = other.get("action", self.singles[0].action_space)
        if isinstance(action, Box) and task_id.startswith("Hopper"):
            action = Box(action.low.astype(np.float64), action.high.astype(np.float64), dtype=np.float64)
        self.action_space = action
        self.single_observation_space, self.single_action_space = self.observation_space, self.action_space
        self.obs = np.zeros((self.num_envs, *self.observation_space.shape), self.observation_space.dtype)
        self.reward = np.zeros(self.num_envs, np.float32)
        self.flags = np.zeros((2, self.num_envs), bool)
        self.ended = np.zeros(self.num_envs, bool)
        self.steps = 0
        self.closings = 0

    def reset(self, env_id: Any = None, *, seed: Any = None, options: Any = None) -> Any:
        assert seed is None and options is None, "ignored by envpool"
        if env_id is not None:  # some of them; only their rows come back
            for i in env_id:
                self.obs[i], self.ended[i] = self.singles[i].reset()[0], False
            return self.obs[env_id], {}
        for i, env in enumerate(self.singles):
            self.obs[i] = env.reset(seed=self.seeds[i] if self.steps == 0 else None)[0]
        self.ended[:] = False
        return self.obs, {}

    def step(self, actions: Any) -> Any:
        assert actions.dtype == self.action_space.dtype
        assert actions.shape == (self.num_envs, *self.action_space.shape) and self.closings == 0
        self.steps += 1
        for i, env in enumerate(self.singles):
            self.reward[i], self.flags[:, i] = 0, False
            if self.ended[i]:
                self.obs[i] = env.reset()[0]
                continue
            action = actions[i] if self.action_space.shape else int(actions[i])
            self.obs[i], reward, terminated, truncated, _ = env.step(action)
            self.reward[i] = np.nan if self.steps == self.nan_reward_at and i == 1 else reward
            self.flags[:, i] = terminated and not truncated, truncated
        self.ended[:] = self.flags.any(0)
        return self.obs, self.reward, *self.flags, {}

    def close(self, **kwargs: Any) -> None:
        self.closings += 1
        for env in self.singles:
            env.close()
