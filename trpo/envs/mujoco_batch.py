"""Simulations of a MuJoCo task of Gymnasium, stepped together by MuJoCo's own batch, on threads.

Gymnasium's environments still begin every episode. What they do between two resets is done here for all at once, with
the same results to the bit.
"""

from __future__ import annotations

import importlib
import importlib.util
from types import SimpleNamespace
from typing import Any

import gymnasium
import numpy as np
from gymnasium.wrappers import OrderEnforcing, TimeLimit

from trpo.config import EnvConfig
from trpo.envs.mujoco_tasks import TASKS, Task
from trpo.envs.spaces import Array
from trpo.envs.stagger import NEVER
from trpo.envs.workers import worker_count
from trpo.errors import EnvError

_INSTEAD = "set env.backend to gymnasium"
_TRIAL_STEPS = 8


class DifferentNumbers(EnvError):
    """Gymnasium as it is installed does not compute what is computed here."""


def knows(config: EnvConfig) -> bool:
    """Whether there can be `Simulations`: of a task in `TASKS` as Gymnasium makes it, by a MuJoCo that has a batch."""
    spec = gymnasium.registry.get(config.id)
    return (
        spec is not None
        and spec.entry_point in TASKS
        and not (config.wrappers or spec.additional_wrappers or config.kwargs.get("render_mode"))
        and importlib.util.find_spec("mujoco") is not None
        and importlib.util.find_spec("mujoco.batch") is not None
    )


def simulations_beside(config: EnvConfig, env: gymnasium.Env[Any, Any], count: int) -> Simulations | None:
    """`Simulations.of` where they are wanted, by `config.backend`, and possible."""
    if config.backend.startswith("gymnasium") or not knows(config):
        return None
    try:
        return Simulations.of(config, env, count)
    except DifferentNumbers:
        return None


class Simulations:
    """One task N times, each going on from where an environment of Gymnasium's was when it was entered.

    Args:
        task: The task.
        count: N.
        threads: That step them, the calling one among them.
        time_limit: Steps after which Gymnasium truncates an episode; nothing here does so.
    """

    def __init__(self, task: Task, count: int, *, threads: int = 1, time_limit: int = NEVER) -> None:
        self.time_limit = time_limit
        self._mujoco = mujoco = importlib.import_module("mujoco")
        self._task = task
        self._model, self._frame_skip, self._dt = task.env.model, task.env.frame_skip, task.env.dt
        # After a step, MuJoCo has computed no contact forces yet, and needs the whole data of a simulation to do so.
        self._whole = mujoco.MjData(self._model) if task.contact_forces else None
        make: Any = importlib.import_module("mujoco.batch").Batch
        self._batch = make(self._model, nsim=count, nthread=threads, persistent=task.contact_forces)
        fields = ("qpos", "qvel", "ctrl", *task.fields)
        self._data = SimpleNamespace(**{name: self._batch.bind(name) for name in fields})
        self._data.cfrc_ext = np.zeros((count, self._model.nbody, 6))
        self._position = np.zeros(count)  # before the next step

    @classmethod
    def of(cls, config: EnvConfig, env: gymnasium.Env[Any, Any], count: int) -> Simulations:
        """Of environments like `env`, on `config.workers` threads; `env` is reset and tried out.

        Raises:
            EnvError: There is no such task here, something is wrapped around it, or MuJoCo is too old.
            DifferentNumbers: Gymnasium's task is another one than that which is known here.
        """
        limit, task = _time_limit(env, config.id), _task(env, config.id)
        _try_out(env, task, config.id)
        return cls(task, count, threads=worker_count(config.workers, count), time_limit=limit)

    def enter(self, i: int, env: gymnasium.Env[Any, Any]) -> None:
        """Simulation i goes on from where `env` is."""
        data: Any = env.unwrapped.data  # type: ignore[attr-defined]
        integration_state = self._mujoco.mjtState.mjSTATE_INTEGRATION
        self._mujoco.mj_getState(self._model, data, self._batch.state[i], integration_state)
        self._position[i] = self._task.position(data)

    def step(self, action: Array, obs: Array, reward: Array, terminated: Array, only: Array | None = None) -> None:
        """Takes actions and writes what Gymnasium's `step` returns.

        Args:
            action: [N, A], in the action space's dtype and bounds.
            obs: [N, D], written.
            reward: [N], written.
            terminated: [N], written.
            only: Ascending numbers of the simulations that take the step; what is written for others means nothing.

        Raises:
            RuntimeError: MuJoCo raised an error in some of them; its `ids` are their numbers.
        """
        task, data = self._task, self._data
        data.ctrl[:] = action
        self._batch.step(only, nstep=self._frame_skip)
        if self._whole is not None:
            for i in range(len(action)) if only is None else only.tolist():
                self._batch.get_data(i, self._whole)
                self._mujoco.mj_rnePostConstraint(self._model, self._whole)
                data.cfrc_ext[i] = self._whole.cfrc_ext
        position = task.position(data)
        velocity = (position - self._position) / self._dt
        self._position[:] = position
        np.concatenate(task.observe(data), axis=1, out=obs)
        reward[:], terminated[:] = task.judge(data, action, velocity)


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
        simulations = Simulations(task, 1)
        env.reset(seed=0)
        simulations.enter(0, env)
        random = np.random.default_rng(0)
        for _ in range(_TRIAL_STEPS):
            action = random.uniform(env.action_space.low, env.action_space.high).astype(np.float32)
            simulations.step(action[None], obs, reward, terminated)
            expected_obs, *expected, _, _ = env.step(action)
            same = expected_obs.tobytes() == obs[0].tobytes() and expected == [reward[0], terminated[0]]
            if not same:
                break
        problem = "" if same else "is not the task that backend mujoco knows"
    except Exception as error:
        problem = f"cannot be tried out: {type(error).__name__}: {error}"
    if problem:
        raise DifferentNumbers(f"{env_id} of Gymnasium {gymnasium.__version__} {problem}; {_INSTEAD}")
