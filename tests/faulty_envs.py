"""Tiny environments for the tests of environment backends; written as `faulty_envs:<Name>-v0` in settings."""

from __future__ import annotations

import os
import random
import sys
import threading
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Discrete


class Counting(gymnasium.Env[Any, Any]):
    """Observes [episode, step, process id, whether torch is loaded], so that each observation can be told apart."""

    observation_space = Box(-np.inf, np.inf, (4,), np.float64)
    action_space = Discrete(2)

    def __init__(self, length: int = 5, ending: str = "truncated") -> None:
        self.length, self.ending, self.episode = length, ending, -1

    def observe(self) -> Any:
        return np.array([self.episode, self.steps, os.getpid(), "torch" in sys.modules], np.float64)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.episode, self.steps = self.episode + 1, 0
        return self.observe(), {}

    def step(self, action: Any) -> Any:
        self.steps += 1
        done = self.steps == self.length
        info = {"is_success": self.episode % 2 == 0} if done else {}
        return self.observe(), 1.0, done and self.ending == "terminated", done and self.ending == "truncated", info


class Unpicklable(Exception):
    def __init__(self, lock: Any) -> None:
        super().__init__("held by a lock")
        self.lock = lock


class Faulty(Counting):
    """Shows `fault` at step `at` of an episode, in the environment first reset with `seed`, in its first process only
    where `marker` names a file to remember it by."""

    def __init__(self, fault: str, seed: int, at: int = 2, marker: str | None = None) -> None:
        super().__init__(length=1000)
        self.fault, self.fault_seed, self.at, self.marker, self.armed = fault, seed, at, marker, False

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        if seed is not None:
            self.armed = seed == self.fault_seed
        obs, info = super().reset(seed=seed)
        return (obs * np.nan, info) if self.armed and self.fault == "nan_reset" else (obs, info)

    def step(self, action: Any) -> Any:
        obs, reward, terminated, truncated, info = super().step(action)
        if not self.armed or self.steps != self.at:
            return obs, reward, terminated, truncated, info
        match self.fault:
            case "nan_reward":
                return obs, np.nan, terminated, truncated, info
            case "huge_reward":
                return obs, 1e160, terminated, truncated, info
            case "huge_obs":
                return obs - 1e160, reward, terminated, truncated, info
            case "inf_obs":
                return obs + np.inf, reward, terminated, truncated, info
            case "obs_shape":
                return obs[:3], reward, terminated, truncated, info
            case "obs_dtype":
                return obs.astype(np.float32), reward, terminated, truncated, info
            case "obs_list":
                return obs.tolist(), reward, terminated, truncated, info
            case "reward_shape":
                return obs, np.ones(1), terminated, truncated, info
            case "reward_text":
                return obs, "1.0", terminated, truncated, info
            case "no_flag":
                return obs, reward, terminated, None, info
            case "no_info":
                return obs, reward, True, truncated, None
            case "raise":
                raise ZeroDivisionError("pole at zero")
            case "deep":
                np.stack([])
            case "unpicklable":
                raise Unpicklable(threading.Lock())
            case "exit":
                sys.exit(7)
            case "die":
                os._exit(3)
            case "hang":
                threading.Event().wait()
        raise AssertionError(self.fault)


class FirstDiffers(Counting):
    """The first one built, as remembered by the file `marker`, fails or has another action space."""

    def __init__(self, marker: str, fails: bool = True) -> None:
        super().__init__()
        try:
            Path(marker).touch(exist_ok=False)
        except FileExistsError:
            return
        if fails:
            raise RuntimeError("no licence found")
        self.action_space = Discrete(3)


class Spaceless(gymnasium.Env[Any, Any]):
    """Lacks a space, or what it takes to be built."""

    def __init__(self, missing: str) -> None:
        if missing == "licence":
            sys.exit("no licence")
        if missing != "observation_space":
            self.observation_space = Counting.observation_space
        if missing != "action_space":
            self.action_space = Counting.action_space


class Echo(gymnasium.Env[Any, Any]):
    """Observes the action it was given, flat, after checking its type as strictly as Gymnasium does."""

    def __init__(self, action_space: Any) -> None:
        self.action_space, self.kept = action_space, np.zeros(())
        size = int(np.prod(action_space.shape, dtype=int))
        self.observation_space = Box(-np.inf, np.inf, (size,), np.float64)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        return np.zeros(self.observation_space.shape), {}

    def step(self, action: Any) -> Any:
        assert self.action_space.contains(action), f"{action!r} is not in {self.action_space}"
        assert not np.any(self.kept), "the action kept from the last step has changed"
        obs = np.array(action, np.float64).ravel()
        if isinstance(action, np.ndarray):
            action[...] = 0  # what an environment may do to its argument, and then keep it
            self.kept = action
        return obs, 0.0, False, False, {}


class Observing(gymnasium.Env[Any, Any]):
    """Observes samples of any space."""

    action_space = Discrete(2)

    def __init__(self, observation_space: Any) -> None:
        self.observation_space = observation_space

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> Any:
        return self.observation_space.sample(), 0.0, False, False, {}


class Drawing(gymnasium.Env[Any, Any]):
    """Observes [a number drawn at each reset, step]."""

    observation_space = Box(-np.inf, np.inf, (2,), np.float64)
    action_space = Discrete(2)

    def draw(self) -> float:
        return float(self.np_random.random())

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.drawn, self.steps = self.draw(), 0
        return np.array([self.drawn, 0.0]), {}

    def step(self, action: Any) -> Any:
        self.steps += 1
        return np.array([self.drawn, self.steps]), 1.0, False, self.steps == 5, {}


class OwnRandomness(Drawing):
    """First reset with the seed `only` it draws from the operating system: no two episodes are alike."""

    def __init__(self, only: int, marker: str) -> None:
        self.only = only

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        if seed is not None:
            self.odd = seed == self.only
        return super().reset(seed=seed)

    def draw(self) -> float:
        return float(int.from_bytes(os.urandom(4))) if self.odd else super().draw()


class Amnesiac(Drawing):
    """Reset with the seed `only` once more, as the file `marker` remembers, it fails in its first step."""

    def __init__(self, only: int, marker: str) -> None:
        self.only, self.marker, self.again = only, Path(marker), False

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        if seed == self.only:
            self.again = self.marker.exists()
            self.marker.touch()
        elif seed is not None:
            self.again = False
        return super().reset(seed=seed)

    def step(self, action: Any) -> Any:
        if self.again:
            raise RuntimeError("seen it all")
        return super().step(action)


class Miser(Amnesiac):
    """Does not fail, but rewards half as much, and nothing that it observes tells."""

    def step(self, action: Any) -> Any:
        obs, reward, *ended = Drawing.step(self, action)
        return obs, reward / (1 + self.again), *ended


class RaisesAfter(Drawing):
    """Raises after so many steps, all episodes together, unless the file `marker` says that one has before."""

    def __init__(self, steps: int, marker: str) -> None:
        self.left, self.marker = steps, Path(marker)

    def step(self, action: Any) -> Any:
        self.left -= 1
        if self.left < 0 and not self.marker.exists():
            self.marker.touch()
            raise RuntimeError("out of fuel")
        return super().step(action)


class OldGenerator(Drawing):
    """Has a generator of numpy's old kind, as dm_control's environments do, or one that is not numpy's."""

    def __init__(self, known: bool = True) -> None:
        self.kind: Any = np.random.RandomState if known else random.Random
        self.generator = self.kind(0)

    @property
    def np_random(self) -> Any:
        return self.generator

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        if seed is not None:
            self.generator = self.kind(seed)
        self.drawn, self.steps = self.draw(), 0
        return np.array([self.drawn, 0.0]), {}

    def draw(self) -> float:
        return float(self.generator.random())


class AddTen(gymnasium.ObservationWrapper[Any, Any, Any]):
    def __init__(self, env: Any, times: int = 1) -> None:
        super().__init__(env)
        self.times = times

    def observation(self, observation: Any) -> Any:
        return observation + 10.0 * self.times


class Told(gymnasium.Env[Any, Any]):
    """Observes the option `x` of its reset, 0 if none was given, and rewards five steps with `times` as much."""

    observation_space = Box(-np.inf, np.inf, (2,), np.float64)
    action_space = Discrete(2)

    def __init__(self, times: float = 1.0) -> None:
        self.times = times

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.x, self.steps = float((options or {}).pop("x", 0.0)), 0  # it may do with them what it likes
        return np.array([self.x, 0.0]), {}

    def step(self, action: Any) -> Any:
        self.steps += 1
        info = {"x squared": self.x**2, "text": "far", "sometimes": np.float32(2.0) if self.x > 1 else None}
        return np.array([self.x, self.steps]), self.x * self.times, False, self.steps == 5, info


class Careless(Counting):
    """Changes the working directory when it is made, or raises when it is closed."""

    def __init__(self, folder: str | None = None, raises: bool = False) -> None:
        super().__init__()
        self.raises = raises
        if folder is not None:
            os.chdir(folder)

    def close(self) -> None:
        if self.raises:
            raise RuntimeError("no handle to free")


for _class in (
    Counting,
    Faulty,
    FirstDiffers,
    Echo,
    Observing,
    OwnRandomness,
    Miser,
    Amnesiac,
    RaisesAfter,
    OldGenerator,
    Spaceless,
    Told,
    Careless,
):
    gymnasium.register(f"{_class.__name__}-v0", entry_point=_class)
