"""Simulations of a MuJoCo task of Gymnasium, stepped together by MuJoCo's own batch, on threads.

Gymnasium's environments still begin every episode. What they do between two resets is done here for all at once, with
the same results to the bit.
"""

from __future__ import annotations

import copy
import ctypes
import importlib
import os
import weakref
from types import SimpleNamespace
from typing import Any

import gymnasium
import numpy as np
from gymnasium.wrappers import OrderEnforcing, TimeLimit

from trpo.config import EnvConfig
from trpo.envs.mujoco_tasks import TASKS, Task
from trpo.envs.spaces import Array
from trpo.envs.stagger import NEVER
from trpo.errors import EnvError, raised
from trpo.runtime.cores import worker_count

_INSTEAD = "set env.backend to gymnasium"
_TRIAL_STEPS = 8  # a formula that was changed shows in the first; what rare values show is for the tests
_alive: weakref.WeakSet[Any] = weakref.WeakSet()


def _keep_for_ever() -> None:
    for batch in _alive:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(batch))


# A forked process has no threads but its own, and would wait for those of a batch for ever when it freed one.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_keep_for_ever)


class NotHere(EnvError):
    """Environments have to be stepped by Gymnasium."""


class DifferentNumbers(NotHere):
    """Gymnasium as it is installed does not compute what is computed here."""


def simulations_beside(config: EnvConfig, env: gymnasium.Env[Any, Any], count: int) -> Simulations | None:
    """`Simulations.of` where they can be, for more than one environment and unless `config.backend` is Gymnasium."""
    if config.backend.startswith("gymnasium") or count == 1:
        return None
    try:
        return Simulations.of(config, env, count)
    except NotHere:
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
        self._model, self._frame_skip, self._dt = _lean(mujoco, task.env.model), task.env.frame_skip, task.env.dt
        # After a step, MuJoCo has computed no contact forces yet, and needs the whole data of a simulation to do so.
        self._whole = mujoco.MjData(self._model) if task.contact_forces else None
        make: Any = importlib.import_module("mujoco.batch").Batch
        self._batch = make(self._model, nsim=count, nthread=threads, persistent=task.contact_forces)
        self._process = os.getpid()
        _alive.add(self._batch)
        fields = ("qpos", "qvel", "ctrl", *task.fields)
        self._data = SimpleNamespace(**{name: self._batch.bind(name) for name in fields})
        self._data.cfrc_ext = np.zeros((count, self._model.nbody, 6))
        self._position = np.zeros(count)  # before the next step

    @classmethod
    def of(cls, config: EnvConfig, env: gymnasium.Env[Any, Any], count: int) -> Simulations:
        """Of environments like `env`, on `config.workers` threads; `env` is reset and tried out.

        Raises:
            NotHere: The task is unknown, wrapped or rendering, or MuJoCo is too old.
            DifferentNumbers: The installed Gymnasium computes the task differently.
        """
        task = _task(env, config)
        limit = _time_limit(env, config.id)
        _try_out(env, task, config)
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
            ValueError: MuJoCo calls back into Python, which it cannot from threads.
            EnvError: This is a fork of the process that made them.
        """
        task, data = self._task, self._data
        if os.getpid() != self._process:
            raise EnvError(
                f"the threads of these environments are those of another process: make them here, or {_INSTEAD}"
            )
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


def _lean(mujoco: Any, model: Any) -> Any:
    """A copy that does not look in each step for bodies that nothing joins: bodies that are one tree are one island."""
    model = copy.copy(model)
    if model.ntree == 1 and not model.opt.enableflags:  # what is asleep, if that is asked for, is so by islands
        model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_ISLAND
    return model


def _time_limit(env: gymnasium.Env[Any, Any], env_id: str) -> int:
    """Of an environment that nothing else is wrapped around."""
    limit = NEVER
    while isinstance(env, gymnasium.Wrapper):
        if type(env) is TimeLimit:
            limit = min(limit, env._max_episode_steps)
        elif type(env) is not OrderEnforcing:
            raise NotHere(f"{env_id} is wrapped in {type(env).__name__}: backend mujoco takes no wrapper; {_INSTEAD}")
        env = env.env
    return limit


def _task(env: gymnasium.Env[Any, Any], config: EnvConfig) -> Task:
    raw: Any = env.unwrapped
    env_id = config.id
    kind = type(raw)
    task = TASKS.get(f"{kind.__module__}:{kind.__qualname__}")
    if task is None:
        known = ", ".join(name for name, spec in gymnasium.registry.items() if spec.entry_point in TASKS)
        raise NotHere(f"env.id: backend mujoco has no {env_id!r}, only {known}; otherwise {_INSTEAD}")
    if config.info:
        raise NotHere(f"env.info: backend mujoco computes no info; leave it out, or {_INSTEAD}")
    if raw.render_mode is not None:
        raise NotHere(f"{env_id} has render_mode {raw.render_mode!r}, and backend mujoco draws nothing; {_INSTEAD}")
    try:
        importlib.import_module("mujoco.batch")
    except ImportError as error:
        version = importlib.import_module("mujoco").__version__
        raise NotHere(
            f"env.backend mujoco needs mujoco.batch, of MuJoCo 4.0; this is {version} ({error}): "
            f"pip install -U mujoco, or {_INSTEAD}"
        ) from error
    return task(raw)


def _try_out(env: Any, task: Task, config: EnvConfig) -> None:
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
            expected_obs, expected_reward, expected_end, *_ = env.step(action)
            given = obs[0].tobytes(), reward.tobytes(), bool(terminated[0])
            same = given == (expected_obs.tobytes(), np.float64(expected_reward).tobytes(), expected_end)
            if not same:
                break
        problem = "" if same else "computes something else than backend mujoco"
    except Exception as error:
        problem = f"is not what backend mujoco expects ({raised(error)})"
    if problem:
        given_kwargs = f" with env.kwargs {config.kwargs}" if config.kwargs else ""
        raise DifferentNumbers(f"{config.id} of Gymnasium {gymnasium.__version__}{given_kwargs} {problem}; {_INSTEAD}")
