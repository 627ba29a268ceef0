"""GAE against its definition as a double sum, and against what it becomes at the ends of λ and γ."""

from __future__ import annotations

import pytest
import torch
from helpers import F64, randn
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trpo.advantages import gae

# At most 12 terms of size 1 to 10 in float64, summed in another order: some 1e-15, taken a hundredfold.
ROUNDING = {"rtol": 1e-12, "atol": 1e-13}


def by_definition(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    valid: Tensor,
    gamma: float,
    lambda_: float,
) -> list[list[float]]:
    """Â_t = Σ_l (γλ)^l δ_{t+l}, l running up to the end of the episode t is in: O(T²) scalars, no recursion."""
    length, envs = reward.shape
    advantage = [[0.0] * envs for _ in range(length)]
    for n in range(envs):
        for t in range(length):
            if not valid[t, n]:
                continue
            for step in range(t, length):
                bootstrap = 0.0 if terminated[step, n] else float(next_value[step, n])
                delta = float(reward[step, n]) + gamma * bootstrap - float(value[step, n])
                advantage[t][n] += (gamma * lambda_) ** (step - t) * delta
                if terminated[step, n] or truncated[step, n] or (step + 1 < length and not valid[step + 1, n]):
                    break
    return advantage


def masks(length: int, envs: int) -> st.SearchStrategy[Tensor]:
    flat = st.lists(st.booleans(), min_size=length * envs, max_size=length * envs)
    return flat.map(lambda values: torch.tensor(values).view(length, envs))


@given(
    data=st.data(), length=st.integers(1, 12), envs=st.integers(1, 3), gamma=st.floats(0, 1), lambda_=st.floats(0, 1)
)
def test_agrees_with_the_definition_whatever_ends_when(
    data: st.DataObject, length: int, envs: int, gamma: float, lambda_: float
) -> None:
    reward, value, next_value = (randn(length, envs, seed=seed) for seed in (1, 2, 3))
    terminated, truncated, invalid = (data.draw(masks(length, envs)) for _ in range(3))
    valid = ~invalid
    advantage, target = gae(reward, value, next_value, terminated, truncated, gamma=gamma, lambda_=lambda_, valid=valid)
    expected = by_definition(reward, value, next_value, terminated, truncated, valid, gamma, lambda_)
    torch.testing.assert_close(advantage, torch.tensor(expected, dtype=F64), **ROUNDING)
    torch.testing.assert_close(target, torch.tensor(expected, dtype=F64) + value, **ROUNDING)


def rollout(length: int = 10, envs: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(reward, V(s) [T, N], V(s′) [T, N], no flags) of one unbroken piece of an episode."""
    states = randn(length + 1, envs, seed=2)
    return randn(length, envs, seed=1), states[:-1], states[1:], torch.zeros(length, envs, dtype=torch.bool)


def test_lambda_0_is_the_one_step_td_error() -> None:
    reward, value, next_value, no = rollout()
    advantage, _ = gae(reward, value, next_value, no, no, gamma=0.9, lambda_=0.0)
    torch.testing.assert_close(advantage, reward + 0.9 * next_value - value, **ROUNDING)


def test_lambda_1_is_the_discounted_return_minus_the_value() -> None:
    reward, value, next_value, no = rollout()
    _, target = gae(reward, value, next_value, no, no, gamma=0.9, lambda_=1.0)
    for t in range(10):
        rest = reward[t:]
        powers = 0.9 ** torch.arange(len(rest), dtype=F64).unsqueeze(1)
        expected = (powers * rest).sum(0) + 0.9 ** len(rest) * next_value[-1]
        torch.testing.assert_close(target[t], expected, **ROUNDING)


def test_by_hand() -> None:
    # γ = 0.5, λ = 0.5. δ = (1 + 0.5·2 − 1, 1 + 0.5·4 − 2) = (1, 1); Â = (1 + 0.25·1, 1).
    no = torch.zeros(2, 1, dtype=torch.bool)
    reward, value = torch.ones(2, 1), torch.tensor([[1.0], [2.0]])
    advantage, target = gae(reward, value, torch.tensor([[2.0], [4.0]]), no, no, gamma=0.5, lambda_=0.5)
    assert advantage.flatten().tolist() == [1.25, 1.0]
    assert target.flatten().tolist() == [2.25, 3.0]


@pytest.mark.parametrize("lambda_", [0.0, 0.5, 0.95, 1.0])
def test_constant_reward_for_ever_is_worth_1_over_1_minus_gamma(lambda_: float) -> None:
    """Fitting V to its own targets converges to 1/(1 − γ): the cut at the rollout's end is bootstrapped, not an end."""
    gamma, length = 0.9, 8
    no = torch.zeros(length, 1, dtype=torch.bool)
    worth = torch.zeros((), dtype=F64)
    for _ in range(400):  # each sweep contracts the error by γ at least: 0.9^400 = 5e-19
        v = worth.expand(length, 1)
        _, target = gae(torch.ones(length, 1, dtype=F64), v, v, no, no, gamma=gamma, lambda_=lambda_)
        worth = target[0, 0]
    assert float(worth) == pytest.approx(1 / (1 - gamma), rel=1e-12)


@pytest.mark.parametrize(("terminated", "truncated"), [(True, False), (False, True), (True, True)])
def test_both_ends_cut_the_sum_but_only_termination_ends_the_world(terminated: bool, truncated: bool) -> None:
    reward, value, next_value, no = rollout(envs=1)
    end = {True: no.clone().index_fill_(0, torch.tensor(4), True), False: no}
    advantage, _ = gae(reward, value, next_value, end[terminated], end[truncated], gamma=0.9, lambda_=0.8)
    bootstrap = 0.0 if terminated else 0.9 * float(next_value[4])
    assert float(advantage[4]) == pytest.approx(float(reward[4]) + bootstrap - float(value[4]), rel=1e-12)
    # Nothing after the end reaches what came before it.
    other, _ = gae(
        reward.index_fill(0, torch.tensor(5), 99.0), value, next_value, end[terminated], end[truncated],
        gamma=0.9, lambda_=0.8,
    )  # fmt: skip
    assert torch.equal(other[:5], advantage[:5]) and not torch.equal(other[5], advantage[5])


def test_a_terminal_successor_may_hold_anything() -> None:
    reward, value, next_value, no = rollout(envs=1)
    end = no.clone().index_fill_(0, torch.tensor(4), True)
    expected, _ = gae(reward, value, next_value, end, no, gamma=0.9, lambda_=0.8)
    with_nan, _ = gae(
        reward, value, next_value.index_fill(0, torch.tensor(4), torch.nan), end, no, gamma=0.9, lambda_=0.8
    )
    assert torch.equal(with_nan, expected)


def test_a_reset_row_has_no_advantage_whatever_it_holds() -> None:
    reward, value, next_value, no = rollout(envs=1)
    row = torch.tensor(5)
    end, valid = no.clone().index_fill_(0, torch.tensor(4), True), ~no.clone().index_fill_(0, row, True)
    garbage = [x.index_fill(0, row, torch.nan) for x in (reward, value, next_value)]
    advantage, _ = gae(*garbage, end, no, gamma=0.9, lambda_=0.8, valid=valid)
    first, _ = gae(reward[:5], value[:5], next_value[:5], end[:5], no[:5], gamma=0.9, lambda_=0.8)
    last, _ = gae(reward[6:], value[6:], next_value[6:], no[6:], no[6:], gamma=0.9, lambda_=0.8)
    assert torch.equal(advantage, torch.cat([first, torch.zeros(1, 1, dtype=F64), last]))


def test_arguments_are_left_alone() -> None:
    reward, value, next_value, no = rollout()
    kept = [x.clone() for x in (reward, value, next_value)]
    gae(reward, value, next_value, no, no, gamma=0.9, lambda_=0.8)
    assert all(torch.equal(x, y) for x, y in zip((reward, value, next_value), kept, strict=True))
    assert not no.any()


def test_float64_is_not_rounded_on_the_way() -> None:
    reward, value, next_value, no = rollout(length=2)
    advantage, _ = gae(reward, value, next_value, no, no, gamma=0.99, lambda_=0.95)
    delta = reward + 0.99 * next_value - value
    # γλ in float32 would be off by 1e-8.
    assert (advantage[0] - (delta[0] + 0.99 * 0.95 * delta[1])).abs().max() <= 1e-15
