"""What an environment returns, held against what its spaces and Gymnasium's interface promise.

Gymnasium only warns of most of it, or casts: pictures of floats become zeros, −1 the last category. Numpy and Gymnasium
only, for worker processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Space, Tuple
from gymnasium.spaces.utils import flatten, flatten_space
from gymnasium.utils import RecordConstructorArgs

from trpo.envs.spaces import Array
from trpo.errors import EnvError

SUCCESS_KEYS = ("is_success", "success")  # Gymnasium-Robotics' and stable-baselines3's, Meta-World's
LARGEST = 1e100  # of an observation or a reward: running moments sum their squares
_FLAGS = (bool, int, np.bool_, np.integer)
_SCALAR_KINDS = "biuf"  # bool, integers, float


class ReturnError(Exception):
    """An environment returned what it must not; the text goes on from `environment 3, step 5 of its episode,`."""


class Flattened(gymnasium.ObservationWrapper[Any, Any, Any], RecordConstructorArgs):
    """Observations as flat rows, as `gymnasium.wrappers.FlattenObservation` makes them, of none but those promised."""

    def __init__(self, env: gymnasium.Env[Any, Any]):
        RecordConstructorArgs.__init__(self)
        super().__init__(env)
        self._space: Space[Any] = env.observation_space
        self.observation_space = flatten_space(self._space)

    def observation(self, observation: Any) -> Any:
        return flattened(observation, self._space)


def flattened(obs: Any, space: Space[Any]) -> Any:
    """`obs` as a flat row [D], if it is of `space`."""
    _check(obs, space, "")
    return flatten(space, obs)


def flat_observation(obs: Any, space: Box) -> Array:
    """`obs` [D], if it is an array of the shape and dtype of the flat `space`."""
    if type(obs) is np.ndarray and obs.shape == space.shape and obs.dtype == space.dtype:
        return obs
    raise ReturnError(
        f"returned {kind_of(obs)} as its observation, its observation_space says {space.dtype}{list(space.shape)}: "
        f"return np.asarray(obs, dtype=np.{space.dtype}) of that shape, or declare the space as it is"
    )


def check_finite(values: Array, what: str, where: Callable[[int], str]) -> None:
    """Raises `EnvError` unless all rows [N, …] are finite, and of a size that can be squared.

    Args:
        values: what the environments gave.
        what: its name, with an article.
        where: names environment i, and when.
    """
    usable = np.abs(values) <= LARGEST if values.dtype == np.float64 else np.isfinite(values)
    if not usable.all():
        i = int(np.flatnonzero(~usable.reshape(len(values), -1).all(axis=1))[0])
        problem = f"beyond {LARGEST:g}" if np.isfinite(values[i]).all() else "not finite"
        raise EnvError(
            f"{where(i)} gave {what} that is {problem} ({values[i].tolist()}): the simulation diverged or the "
            "environment divides by zero; fix it there, nothing downstream has used the value"
        )


def scalar_reward(reward: Any) -> float:
    if isinstance(reward, float | int) or (
        isinstance(reward, np.generic | np.ndarray) and reward.ndim == 0 and reward.dtype.kind in _SCALAR_KINDS
    ):
        return float(reward)
    raise ReturnError(f"returned {kind_of(reward)} as its reward: return a scalar, such as float(reward)")


def flag(value: Any, name: str) -> bool:
    """`terminated` or `truncated`."""
    if isinstance(value, _FLAGS) or (isinstance(value, np.ndarray) and value.ndim == 0 and value.dtype.kind in "biu"):
        return bool(value)
    raise ReturnError(f"returned {kind_of(value)} as {name}: return True or False")


def success_of(info: Any) -> float:
    """What the last step of an episode reports as its success, 0 to 1; NaN if nothing."""
    if not isinstance(info, Mapping):
        raise ReturnError(f"returned {kind_of(info)} as its info: return a dict")
    first, second = SUCCESS_KEYS
    given = info.get(first)
    if given is None:
        number = _number(info.get(second))
        return number if 0 <= number <= 1 else math.nan  # that name has other meanings, too
    if math.isnan(number := _number(given)):
        raise ReturnError(f"returned info with {first!r}: {given!r}: report True, False or a number")
    return number


def numbers_of(info: Mapping[str, Any], names: Sequence[str]) -> list[float]:
    """What the last step of an episode reports under these names; NaN where nothing, or no finite number."""
    return [_number(info.get(name)) for name in names]


def _number(given: Any) -> float:
    """NaN for what is none, or not finite."""
    try:
        number = float(np.asarray(given, float).item())
    except (TypeError, ValueError):
        return math.nan
    return number if math.isfinite(number) else math.nan


def _check(obs: Any, space: Space[Any], part: str) -> None:
    """Raises `ReturnError` unless `obs` is of `space`, or can be without a number changed; bounds of a Box aside.

    `part`: where in the whole observation, as `['camera'][0]`.
    """
    if isinstance(space, Dict):
        if not isinstance(obs, Mapping) or obs.keys() != space.spaces.keys():
            given = f"keys {sorted(obs, key=str)}" if isinstance(obs, Mapping) else kind_of(obs)
            raise _unlike(given, part, f"a dict with the keys {sorted(space.spaces, key=str)}")
        for key, inner in space.spaces.items():
            _check(obs[key], inner, f"{part}[{key!r}]")
    elif isinstance(space, Tuple):
        if not isinstance(obs, tuple | list | np.ndarray) or len(obs) != len(space.spaces):
            raise _unlike(kind_of(obs), part, f"a tuple of {len(space.spaces)}")
        for i, inner in enumerate(space.spaces):
            _check(obs[i], inner, f"{part}[{i}]")
    else:
        _check_array(obs, space, part)


def _check_array(obs: Any, space: Space[Any], part: str) -> None:
    assert isinstance(space, Box | Discrete | MultiDiscrete | MultiBinary)
    if isinstance(space, Discrete) and isinstance(obs, int | np.integer):
        if not space.start <= obs < space.start + space.n:
            raise _unlike(str(obs), part, str(space))
        return
    dtype = np.dtype(space.dtype)
    try:
        array = np.asarray(obs)
        fits = array.shape == space.shape and _keeps(array, dtype)
    except ValueError:  # lists of different lengths
        fits = False
    if not fits:
        raise _unlike(kind_of(obs), part, f"{dtype}{list(space.shape or ())}")
    if isinstance(space, Box):
        return
    lowest: Any = 0 if isinstance(space, MultiBinary) else space.start
    count: Any = space.n if isinstance(space, Discrete) else 2 if isinstance(space, MultiBinary) else space.nvec
    if not np.all((lowest <= array) & (array < lowest + count)):
        raise _unlike(f"{array.tolist()}", part, str(space))


def _keeps(array: Array, dtype: np.dtype[Any]) -> bool:
    """Whether all numbers are the same in `dtype`, but for the rounding of floats."""
    if np.can_cast(array.dtype, dtype, "safe"):
        return True
    if dtype.kind == "f":
        return array.dtype.kind in _SCALAR_KINDS
    return array.dtype.kind in "biu" and bool(np.array_equal(array.astype(dtype), array))


def _unlike(given: str, part: str, expected: str) -> ReturnError:
    where = f" {part} of" if part else ""
    return ReturnError(
        f"returned {given} as{where} its observation, its observation_space says {expected}: return that, or declare "
        "the space as it is"
    )


def kind_of(value: Any) -> str:
    if isinstance(value, np.ndarray | np.generic):
        return f"{value.dtype}{list(value.shape)}"
    if value is None:
        return "None"
    name = type(value).__name__
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"
