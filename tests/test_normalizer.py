"""Running moments against numpy on all rows at once, however these arrive; scaling against plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers import F64, randn
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trpo.normalizer import EPSILON, ObservationNormalizer, RewardScaler, RunningMoments

# Two-pass moments in float64: rounding of sums of some hundred terms of size 1.
ROUNDING = {"rtol": 1e-11, "atol": 1e-12}
splits = st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(lambda sizes: sum(sizes) > 0)


def check(moments: RunningMoments, rows: Tensor, **tolerance: float) -> None:
    values = rows.double().numpy()
    assert float(moments.count) == len(values)
    np.testing.assert_allclose(moments.mean.numpy(), values.mean(0), **(ROUNDING | tolerance))
    np.testing.assert_allclose(moments.variance.numpy(), values.var(0), **(ROUNDING | tolerance))


def filled(rows: Tensor) -> RunningMoments:
    moments = RunningMoments(rows.shape[1])
    moments.update(rows)
    return moments


@given(sizes=splits, seed=st.integers(0, 100))
def test_any_split_into_updates_gives_the_moments_of_the_whole(sizes: list[int], seed: int) -> None:
    rows = 3 + 2 * randn(sum(sizes), 2, seed=seed)
    moments = RunningMoments(2)
    for part in rows.split(sizes):
        moments.update(part)
    check(moments, rows)


@given(sizes=splits, seed=st.integers(0, 100))
def test_any_split_into_merges_gives_the_moments_of_the_whole(sizes: list[int], seed: int) -> None:
    rows = 3 + 2 * randn(sum(sizes), 2, seed=seed)
    moments = RunningMoments(2)
    for part in rows.split(sizes):
        other = filled(part)
        moments.merge(other.count, other.mean, other.m2)
    check(moments, rows)


def test_a_large_mean_costs_no_digits() -> None:
    rows = 1e6 + randn(1000, 2)
    moments = RunningMoments(2)
    for part in rows.split(100):
        moments.update(part)
    # The naive E[x²] − E[x]² would lose 1e12 · 2.2e-16 = 2e-4 of a variance of 1; the data itself holds 1e6 · 1.1e-16.
    check(moments, rows, rtol=1e-9)


def test_float32_rows_are_summed_in_float64() -> None:
    rows = (1000 + randn(5000, 1)).float()
    check(filled(rows), rows)  # a float32 sum would be off by 1e-5 or so


def test_before_any_row_the_moments_are_those_of_a_standard_variable() -> None:
    moments = RunningMoments(2)
    moments.update(torch.empty(0, 2))
    assert (float(moments.count), moments.mean.tolist(), moments.variance.tolist()) == (0, [0, 0], [1, 1])


def test_sums_over_processes_give_the_moments_of_all_rows() -> None:
    """Two processes in turn, the second one's sums known beforehand: unequal shares, one of them empty at first."""
    rows, more = 5 + randn(7, 2, seed=1), 5 + 3 * randn(30, 2, seed=2)
    moments = RunningMoments(2)
    for here, there in ((rows[:0], rows), (more[:4], more[4:])):
        mean = moments.mean.clone()
        shifted = there - mean
        other = iter([torch.cat([shifted.sum(0), torch.tensor([float(len(there))], dtype=F64)])])
        both = torch.cat([here, there])
        m2 = (there - both.mean(0)).square().sum(0)
        moments.update(here, all_sum=lambda t, other=other, m2=m2: t + next(other, m2))
    check(moments, torch.cat([rows, more]))


def normalizer(**options: object) -> ObservationNormalizer:
    return ObservationNormalizer(2, **({"clip": 10.0, "dtype": F64} | options))


def test_normalising_standardises_what_was_seen() -> None:
    rows, module = (
        torch.tensor([5.0, -3.0], dtype=F64) + torch.tensor([2.0, 0.1], dtype=F64) * randn(500, 2),
        normalizer(),
    )
    module.update(rows)
    out = module(rows)
    # ε = 1e-8 is added to a variance of 0.01: half of 1e-6 relative.
    np.testing.assert_allclose(out.mean(0).numpy(), 0, atol=1e-12)
    np.testing.assert_allclose(out.numpy().std(0), 1, rtol=1e-6)


def test_it_divides_by_the_standard_deviation_and_not_by_the_variance() -> None:
    module = normalizer()
    module.update(torch.tensor([[0.0, 0.0], [8.0, 8.0]], dtype=F64))  # mean 4, σ 4
    assert module(torch.tensor([8.0, 0.0], dtype=F64)).tolist() == pytest.approx([1.0, -1.0], rel=1e-8)


def test_nothing_but_update_changes_it() -> None:
    module, rows = normalizer(), randn(50, 2)
    module.update(rows)
    before = {name: value.clone() for name, value in module.named_buffers()}
    kept, first = rows.clone(), module(rows)
    module(1e3 * rows)
    assert torch.equal(module(rows), first) and torch.equal(rows, kept)
    assert all(torch.equal(value, before[name]) for name, value in module.named_buffers())
    module.update(rows + 1)
    assert not torch.equal(module(rows), first)


def test_clips_on_both_sides() -> None:
    module = normalizer(clip=1.5)
    module.update(randn(50, 2))
    assert module(torch.tensor([[1e9, -1e9]], dtype=F64)).tolist() == [[1.5, -1.5]]


def test_a_constant_feature_gives_zeros() -> None:
    module = normalizer()
    module.update(torch.full((50, 2), 0.3, dtype=F64))
    assert module(torch.full((3, 2), 0.3, dtype=F64)).abs().max() <= 1e-10  # 1e4 · rounding of the mean


def test_disabled_it_only_changes_the_type() -> None:
    module, rows = normalizer(enabled=False, dtype=torch.float32), randn(50, 2)
    module.update(rows)
    assert torch.equal(module(100 * rows), (100 * rows).float())
    assert float(module.moments.count) == 0


def test_a_loaded_state_normalises_alike() -> None:
    source, target = normalizer(), normalizer()
    source.update(3 + randn(50, 2))
    target.load_state_dict(source.state_dict())
    assert torch.equal(target(randn(5, 2)), source(randn(5, 2)))


def discounted_returns(reward: Tensor, done: Tensor, valid: Tensor, gamma: float) -> list[float]:
    """G at every transition, environment by environment, by a plain loop over scalars."""
    out = []
    for n in range(reward.shape[1]):
        running = 0.0
        for t in range(reward.shape[0]):
            if valid[t, n]:
                running = gamma * running + float(reward[t, n])
                out.append(running)
            if done[t, n]:
                running = 0.0
    return out


def episodes(length: int = 40, envs: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """(reward, done, valid) [T, N] with resets as rows of their own after each end."""
    done = randn(length, envs, seed=5) > 1
    invalid = torch.zeros_like(done)
    invalid[1:] = done[:-1]
    return torch.where(invalid, 0.0, 1 + randn(length, envs, seed=6)), done & ~invalid, ~invalid


@pytest.mark.parametrize("at_end", [False, True])
def test_rewards_are_divided_by_the_spread_of_the_discounted_return(at_end: bool) -> None:
    """However they are shared out to updates, of which the first ends where an episode does, or where none does."""
    reward, done, valid = episodes()
    scaler = RewardScaler(3, gamma=0.9, clip=10.0)
    first = next(t for t in range(15, len(done)) if done[t - 1].any() == at_end)
    for part in (slice(first), slice(first, None)):
        scaler.update(reward[part], done[part], valid[part])
    expected = discounted_returns(reward, done, valid, 0.9)
    variance = np.var(expected)
    assert float(scaler.moments.count) == len(expected)
    np.testing.assert_allclose(scaler.moments.variance.numpy(), variance, rtol=1e-11)
    np.testing.assert_allclose(scaler(reward).numpy(), reward.numpy() / math.sqrt(variance + EPSILON), rtol=1e-11)


def test_scaled_rewards_keep_their_sign_and_are_clipped() -> None:
    scaler = RewardScaler(1, gamma=0.9, clip=2.0)
    none = torch.zeros(20, 1, dtype=torch.bool)
    scaler.update(randn(20, 1), none, ~none)
    out = scaler(torch.tensor([1e9, -1e9, 0.0], dtype=F64))
    assert out.tolist() == [2.0, -2.0, 0.0]


def test_a_disabled_scaler_changes_nothing() -> None:
    reward, done, valid = episodes()
    scaler = RewardScaler(3, gamma=0.9, clip=2.0, enabled=False)
    scaler.update(reward, done, valid)
    assert torch.equal(scaler(100 * reward), 100 * reward) and float(scaler.moments.count) == 0
