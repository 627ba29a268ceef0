"""What environments return: Gymnasium's own flattening is the oracle of what is right, `Space.contains` of most that is
not."""

from __future__ import annotations

import re
import warnings
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Space, Tuple
from gymnasium.wrappers import FlattenObservation

from trpo.envs.returned import Flattened, ReturnError, flag, numbers_of, scalar_reward

PICTURE = Box(0, 255, (4, 6, 1), np.uint8)
NESTED = Dict({"camera": Tuple([PICTURE, Box(-1, 1, (), np.float32)]), "gear": Discrete(5, start=-1)})
SPACES: list[Space[Any]] = [
    PICTURE,
    Box(-np.inf, np.inf, (2, 3), np.float64),
    Discrete(3, start=2),
    MultiDiscrete([2, 5], start=[0, -2]),
    MultiBinary([2, 2]),
    NESTED,
]


class Returning(gymnasium.Env[Any, Any]):
    action_space = Discrete(2)

    def __init__(self, space: Space[Any]) -> None:
        self.observation_space = space
        self.observation: Any = None

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        return self.observation, {}


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_what_a_space_contains_is_flattened_as_gymnasium_does_it(space: Space[Any]) -> None:
    env = Returning(space)
    ours, theirs = Flattened(env), FlattenObservation(env)
    assert ours.observation_space == theirs.observation_space
    space.seed(0)
    for _ in range(20):
        env.observation = space.sample()
        expected = theirs.reset()[0]
        assert np.array_equal(ours.reset()[0], expected) and ours.reset()[0].dtype == expected.dtype


@pytest.mark.parametrize(
    ("space", "given"),
    [
        (Box(-1, 1, (2, 2), np.float32), [[0.5, 0.25], [-1, 1]]),  # a list of the right shape
        (Box(-1, 1, (2, 2), np.float32), np.full((2, 2), 0.5)),  # of a larger float
        (Box(-1, 1, (2, 2), np.float32), np.full((2, 2), 7, np.float32)),  # out of bounds
        (Discrete(3, start=2), 4),
        (PICTURE, np.full((4, 6, 1), 7)),  # integers, of whatever size, that are the same in eight bits
        (Box(0, 5, (2, 2), np.uint8), [[1, 2], [3, 0]]),
        (Tuple([Discrete(3), Discrete(3)]), np.array([1, 2])),
        (MultiBinary(2), np.array([True, False])),
        (Dict({"a": Box(-1, 1, (), np.float32)}), {"a": 0.5}),
    ],
)
def test_what_loses_nothing_is_taken(space: Space[Any], given: Any) -> None:
    env = Returning(space)
    env.observation = given
    assert np.array_equal(Flattened(env).reset()[0], FlattenObservation(env).reset()[0])


@pytest.mark.parametrize(
    ("space", "given", "message"),
    [
        (
            PICTURE,
            np.full((4, 6, 1), 0.5),
            "float64[4, 6, 1] as its observation, its observation_space says uint8[4, 6",
        ),
        (PICTURE, np.full((4, 6, 1), np.nan, np.float32), "float32[4, 6, 1] as its observation"),
        (PICTURE, np.full((4, 6, 1), 300), "int64[4, 6, 1] as its observation"),
        (PICTURE, np.full((4, 6, 1), -1, np.int8), "int8[4, 6, 1] as its observation"),
        (Box(-9, 9, (1, 1), np.int32), np.array([[2**40]]), "int64[1, 1] as its observation"),
        (Box(0, 1, (2, 2), np.uint8), [[0, 1], [1]], "a list as its observation"),
        (PICTURE, np.zeros((1, 4, 6), np.uint8), "uint8[1, 4, 6] as its observation"),
        (PICTURE, None, "None as its observation"),
        (Discrete(3), -1, "-1 as its observation, its observation_space says Discrete(3)"),
        (Discrete(3), 3, "3 as its observation"),
        (Discrete(3, start=2), 1, "1 as its observation"),
        (Discrete(3), 1.0, "a float as its observation"),
        (Discrete(3), np.array([1]), "int64[1] as its observation"),
        (MultiDiscrete([2, 5]), np.array([1, 5]), "[1, 5] as its observation"),
        (MultiBinary(2), np.array([0, 2], np.int8), "[0, 2] as its observation"),
        (MultiBinary(2), np.array([0.5, 1.0]), "float64[2] as its observation"),
        (
            NESTED,
            {"gear": 0},
            "keys ['gear'] as its observation, its observation_space says a dict with the keys ['cam",
        ),
        (NESTED, [0, 1], "a list as its observation"),
        (
            NESTED,
            {"camera": (np.zeros((4, 6, 1), np.uint8), 0.5), "gear": 4},
            "4 as ['gear'] of its observation, its observation_space says Discrete(5, start=-1)",
        ),
        (
            NESTED,
            {"camera": (np.zeros((4, 6), np.uint8), 0.5), "gear": 0},
            "uint8[4, 6] as ['camera'][0] of its observation",
        ),
        (
            NESTED,
            {"camera": (np.zeros((4, 6, 1), np.uint8),), "gear": 0},
            "a tuple as ['camera'] of its observation, its observation_space says a tuple of 2",
        ),
    ],
)
def test_what_is_not_of_the_space_is_named_with_its_part(space: Space[Any], given: Any, message: str) -> None:
    with warnings.catch_warnings(action="ignore"):  # of Gymnasium's, that it casts
        assert not space.contains(given)
    env = Returning(space)
    env.observation = given
    with pytest.raises(ReturnError, match=re.escape(f"returned {message}")):
        Flattened(env).reset()


@pytest.mark.parametrize("reward", [1, 0.5, True, np.float32(0.5), np.int64(2), np.array(0.5)])
def test_a_scalar_is_a_reward(reward: Any) -> None:
    assert scalar_reward(reward) == float(reward)


@pytest.mark.parametrize("reward", [None, "1.0", [1.0], np.ones(1), np.array("1.0"), 1j])
def test_anything_else_is_not(reward: Any) -> None:
    with pytest.raises(ReturnError, match="as its reward: return a scalar"):
        scalar_reward(reward)


@pytest.mark.parametrize("value", [True, False, np.True_, 0, 1, np.int64(1), np.array(False)])
def test_a_truth_value_is_a_flag(value: Any) -> None:
    assert flag(value, "terminated") is bool(value)


@pytest.mark.parametrize("value", [None, "no", 0.0, [True], np.array([True]), np.array("no"), np.array(np.nan), {}])
def test_anything_else_is_none(value: Any) -> None:
    with pytest.raises(ReturnError, match="as terminated: return True or False"):
        flag(value, "terminated")


@pytest.mark.parametrize("given", [np.inf, -np.inf, np.nan, "far", None, [1.0, 2.0]])
def test_what_is_no_finite_number_in_info_is_nan(given: Any) -> None:
    """JSON has no infinity, and no mean survives one."""
    numbers = numbers_of({"there": 2, "given": given}, ["there", "given", "missing"])
    assert np.array_equal(numbers, [2.0, np.nan, np.nan], equal_nan=True)
