"""Exact restore of an environment by replaying its episode.

Most simulators cannot be saved: a pickled MuJoCo environment is a fresh one, and setting its state is exact for some
models only. But an episode is a function of the random state at its reset and of the actions since, and both are small.
"""

from __future__ import annotations

import copy
from typing import Any

import gymnasium
import numpy as np

from trpo.envs.spaces import ActionEncoding, Array
from trpo.errors import EnvError

_FIRST_CAPACITY = 256

# Environments whose physics world outlives their reset: the order of its contacts, and with it the rounding, depends on
# all episodes before, so that an episode is no function of its random state unless it starts in a fresh environment.
_KEEPS_ITS_WORLD = {
    "gymnasium.envs.box2d.bipedal_walker:BipedalWalker",
    "gymnasium.envs.box2d.car_racing:CarRacing",
}


class EpisodeLog:
    """How one environment's present episode came about: how it was reset, and the native actions [n, A] since.

    Memory grows with the length of the episode: about 4·A bytes a step in an environment that never ends one.
    """

    def __init__(self, encoding: ActionEncoding) -> None:
        self._rows = np.empty((_FIRST_CAPACITY, encoding.size), encoding.dtype)
        self._length = 0
        self.seed: int | None = None
        self.rng: dict[str, Any] | None = None
        self.options: dict[str, Any] = {}

    def start(self, *, seed: int | None, rng: dict[str, Any] | None, options: dict[str, Any]) -> None:
        """A new episode, begun by `reset(seed=seed)`, or by `reset()` with the random state `rng`."""
        self._length, self.seed, self.rng, self.options = 0, seed, rng, options

    def append(self, row: Array) -> None:
        """Records the native action row [A] about to be taken."""
        if self._length == len(self._rows):
            self._rows = np.concatenate([self._rows, np.empty_like(self._rows)])
        self._rows[self._length] = row
        self._length += 1

    def extend(self, rows: Array) -> None:
        """Records native action rows [n, A]."""
        length = self._length + len(rows)
        while length > len(self._rows):
            self._rows = np.concatenate([self._rows, np.empty_like(self._rows)])
        self._rows[self._length : length] = rows
        self._length = length

    def state(self, obs: Array, total: float) -> dict[str, Any]:
        """JSON values and arrays from which `replay` comes back here.

        Args:
            obs: The present observation [D].
            total: Sum of the episode's rewards, in order.
        """
        if self.seed is None and self.rng is None:
            raise RuntimeError("state_dict() before the first reset()")
        began = {"seed": self.seed, "rng": self.rng, "options": self.options}
        return {**began, "actions": self._rows[: self._length].copy(), "obs": obs.copy(), "return": total}


class ReplayError(EnvError):
    """An episode cannot be replayed to the bit."""


def needs_fresh_environment(env: gymnasium.Env[Any, Any]) -> bool:
    """Whether each episode has to start in a newly built environment to be replayable."""
    return any(f"{kind.__module__}:{kind.__qualname__}" in _KEEPS_ITS_WORLD for kind in type(env.unwrapped).__mro__)


def random_state(env: gymnasium.Env[Any, Any]) -> dict[str, Any]:
    """The state of the environment's own generator, as plain values; {} of one that is not numpy's."""
    generator: Any = env.unwrapped.np_random
    if isinstance(generator, np.random.RandomState):  # dm_control's environments, for one
        return dict(generator.get_state(legacy=False))
    return dict(generator.bit_generator.state) if isinstance(generator, np.random.Generator) else {}


def _set_random_state(env: gymnasium.Env[Any, Any], state: dict[str, Any]) -> None:
    generator: Any = env.unwrapped.np_random
    if isinstance(generator, np.random.RandomState):
        generator.set_state(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state


def begin(
    env: gymnasium.Env[Any, Any],
    log: EpisodeLog,
    *,
    seed: int | None,
    rng: dict[str, Any] | None,
    options: dict[str, Any],
) -> Any:
    """Resets `env`, records how, and returns the first observation.

    Args:
        env: The environment.
        log: Where this episode is recorded.
        seed: Given to `reset`, or None to go on with the environment's generator.
        rng: State to put that generator in first, or None to leave it as it is. Not with a seed.
        options: Given to `reset`, if there are any.
    """
    if rng is not None:
        _set_random_state(env, rng)
    log.start(seed=seed, rng=None if seed is not None else random_state(env), options=options)
    obs, _ = env.reset(seed=seed, options=copy.deepcopy(options) if options else None)  # the environment may change it
    return obs


def replay(
    env: gymnasium.Env[Any, Any], log: EpisodeLog, encoding: ActionEncoding, state: dict[str, Any], index: int
) -> Any:
    """Brings `env` to the state that `EpisodeLog.state` described; returns the observation.

    Raises:
        EnvError: The recorded actions do not fit.
        ReplayError: The observation reached, or what was rewarded on the way, differs in any bit from the recorded.
    """
    actions = np.asarray(state["actions"])
    if actions.shape[1:] != (encoding.size,) or actions.dtype != encoding.dtype:
        raise EnvError(
            f"environment {index}: the recorded actions are {actions.dtype}{list(actions.shape[1:])}, the action "
            f"space takes {encoding.dtype}[{encoding.size}]: resume with the environment the run was started with"
        )
    obs = begin(env, log, seed=state["seed"], rng=state["rng"], options=state["options"])
    total = 0.0
    for row in actions:
        log.append(row)
        obs, reward, *_ = env.step(encoding.single(row))
        total += float(reward)
    recorded = np.asarray(state["obs"])
    reached = np.asarray(obs).astype(recorded.dtype)
    same = reached.shape == recorded.shape and reached.tobytes() == recorded.tobytes()
    if not same or total != state["return"]:
        raise ReplayError(
            f"environment {index} did not come back to its recorded {'return' if same else 'observation'} when its "
            "episode was replayed: it draws random numbers outside `self.np_random` or keeps state across resets, or "
            "its package has another version"
        )
    return obs
