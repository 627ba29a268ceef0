"""`MujocoEnvs`: Gymnasium's MuJoCo tasks, all stepped in one call by MuJoCo's own batch, on threads.

Gymnasium's environments are still built, and still begin every episode: only what they do between two resets is done
for all at once, with the same results to the bit. So checkpoints are those of the backend `gymnasium`, too.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import gymnasium
import numpy as np
from gymnasium.wrappers import OrderEnforcing, TimeLimit

from trpo.config import EnvConfig
from trpo.envs.gymnasium import GymnasiumEnvs
from trpo.envs.mujoco_tasks import TASKS, Task
from trpo.envs.shard import EnvShard
from trpo.envs.spaces import Array
from trpo.envs.stagger import NEVER
from trpo.envs.workers import worker_count
from trpo.errors import EnvError

_INSTEAD = "set env.backend to gymnasium"
_TRIAL_STEPS = 8


class DifferentNumbers(EnvError):
    """Gymnasium as it is installed does not compute what is computed here."""


def knows(config: EnvConfig) -> bool:
    """Whether `MujocoEnvs` can run this: a task of `TASKS` as Gymnasium makes it, and a MuJoCo that has a batch."""
    spec = gymnasium.registry.get(config.id)
    return (
        spec is not None
        and spec.entry_point in TASKS
        and not (config.wrappers or spec.additional_wrappers or config.kwargs.get("render_mode"))
        and importlib.util.find_spec("mujoco") is not None
        and importlib.util.find_spec("mujoco.batch") is not None
    )


class MujocoEnvs(GymnasiumEnvs):
    """N environments of a MuJoCo task of Gymnasium, on `config.workers` threads; a `BatchEnv`.

    Numbers, states and messages are those of `GymnasiumEnvs`, whatever the number of threads.

    Raises:
        EnvError: There is no such task here, the settings name wrappers, or MuJoCo is too old.
        DifferentNumbers: Gymnasium's task is another one than that which is known here.
    """

    def _shard_of(self, config: EnvConfig, seeds: Sequence[int]) -> EnvShard:
        return MujocoShard(config, seeds, threads=worker_count(config.workers, len(seeds)))


class MujocoShard(EnvShard):
    """k environments of one of the `TASKS`, stepped by `threads` threads, the calling one among them."""

    def __init__(self, config: EnvConfig, seeds: Sequence[int], *, threads: int) -> None:
        super().__init__(config, seeds)
        try:
            env = self._envs[0]
            self._time_limit = _time_limit(env, config.id)
            task = _task(env, config.id)
            _try_out(env, task, config.id)
            self._simulations = _Simulations(task, len(seeds), threads)
        except BaseException:
            self.close()
            raise

    def _act(self) -> None:
        buffers = self._buffers
        for log, row in zip(self._logs, buffers.action, strict=True):
            log.append(row)
        try:
            self._simulations.step(buffers.action, buffers.next_obs, buffers.reward, buffers.terminated)
        except RuntimeError as error:  # batch.SimulationError
            i = int(getattr(error, "ids", [0])[0])
            raise EnvError(f"{self._where(i)} raised {type(error).__name__}: {error}") from error
        limits = np.minimum(self._cut_after, self._time_limit)
        np.greater_equal(self._episode_steps, limits, out=buffers.truncated)

    def _entered(self, i: int) -> None:
        self._simulations.enter(i, self._envs[i])


class _Simulations:
    """The same task `count` times, each where an environment of Gymnasium's was when it was entered."""

    def __init__(self, task: Task, count: int, threads: int) -> None:
        self._mujoco = mujoco = importlib.import_module("mujoco")
        self._task = task
        self._model, self._frame_skip, self._dt = task.env.model, task.env.frame_skip, task.env.dt
        # After a step, MuJoCo has computed no contact forces yet, and needs the whole data of a simulation to do so.
        self._whole = mujoco.MjData(self._model) if task.contact_forces else None
        make: Any = importlib.import_module("mujoco.batch").Batch
        self._batch = make(self._model, nsim=count, nthread=threads, persistent=task.contact_forces)
        self._data = SimpleNamespace(
            **{name: self._batch.bind(name) for name in ("qpos", "qvel", "ctrl", *task.fields)}
        )
        self._data.cfrc_ext = np.zeros((count, self._model.nbody, 6))
        self._position = np.zeros(count)  # before the next step

    def enter(self, i: int, env: gymnasium.Env[Any, Any]) -> None:
        """Simulation i goes on from where `env` is."""
        whole = self._mujoco.mjtState.mjSTATE_INTEGRATION
        data = env.unwrapped.data  # type: ignore[attr-defined]
        self._mujoco.mj_getState(self._model, data, self._batch.state[i], whole)
        self._position[i] = self._task.position(data)

    def step(self, action: Array, obs: Array, reward: Array, terminated: Array) -> None:
        """Takes actions [N, A] and writes the rest, N rows each."""
        task, data = self._task, self._data
        data.ctrl[:] = action
        self._batch.step(nstep=self._frame_skip)
        if self._whole is not None:
            self._contact_forces(self._whole)
        position = task.position(data)
        velocity = (position - self._position) / self._dt
        self._position[:] = position
        np.concatenate(task.observe(data), axis=1, out=obs)
        reward[:], terminated[:] = task.judge(data, action, velocity)

    def _contact_forces(self, whole: Any) -> None:
        for i, forces in enumerate(self._data.cfrc_ext):
            self._batch.get_data(i, whole)
            self._mujoco.mj_rnePostConstraint(self._model, whole)
            forces[:] = whole.cfrc_ext


def _time_limit(env: gymnasium.Env[Any, Any], env_id: str) -> int:
    """Of an environment that nothing else is wrapped around."""
    limit = NEVER
    while isinstance(env, gymnasium.Wrapper):
        if type(env) is TimeLimit:
            limit = min(limit, env._max_episode_steps)
        elif type(env) is not OrderEnforcing:
            raise EnvError(f"{env_id} is wrapped in {type(env).__name__}: backend mujoco takes no wrapper; {_INSTEAD}")
        env = env.env
    return limit


def _task(env: gymnasium.Env[Any, Any], env_id: str) -> Task:
    raw: Any = env.unwrapped
    kind = type(raw)
    task = TASKS.get(f"{kind.__module__}:{kind.__qualname__}")
    if task is None:
        known = ", ".join(name for name, spec in gymnasium.registry.items() if spec.entry_point in TASKS)
        raise EnvError(f"env.id: backend mujoco has no {env_id!r}, only {known}; otherwise {_INSTEAD}")
    if raw.render_mode is not None:
        raise EnvError(f"env.kwargs: backend mujoco draws nothing; remove render_mode, or {_INSTEAD}")
    try:
        importlib.import_module("mujoco.batch")
    except ImportError as error:
        version = importlib.import_module("mujoco").__version__
        raise EnvError(
            f"env.backend mujoco needs MuJoCo 4.0, this is {version}: pip install -U mujoco, or {_INSTEAD}"
        ) from error
    return task(raw)


def _try_out(env: Any, task: Task, env_id: str) -> None:
    """Raises `DifferentNumbers` unless some steps of `env` are the same here, to the bit."""
    obs, reward, terminated = np.zeros((1, *env.observation_space.shape)), np.zeros(1), np.zeros(1, bool)
    try:
        simulation = _Simulations(task, 1, 1)
        env.reset(seed=0)
        simulation.enter(0, env)
        random = np.random.default_rng(0)
        for _ in range(_TRIAL_STEPS):
            action = random.uniform(env.action_space.low, env.action_space.high).astype(np.float32)
            simulation.step(action[None], obs, reward, terminated)
            expected_obs, *expected, _, _ = env.step(action)
            same = expected_obs.tobytes() == obs[0].tobytes() and expected == [reward[0], terminated[0]]
            if not same:
                break
        problem = "" if same else "is not the task that backend mujoco knows"
    except Exception as error:
        problem = f"cannot be tried out: {type(error).__name__}: {error}"
    if problem:
        raise DifferentNumbers(f"{env_id} of Gymnasium {gymnasium.__version__} {problem}; {_INSTEAD}")
