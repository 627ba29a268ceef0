"""The effective dimension against the dense Fisher matrix, and the damping that follows it."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import OBS_DIM, eta_function, make_policy, randn, seeded, settings, torch_kl

import trpo.natural_gradient.damping
from trpo.batch import Batch
from trpo.natural_gradient import Damping, effective_dimension
from trpo.natural_gradient.explicit import fisher_matrix

BATCH = 30


@pytest.mark.parametrize("damping", [0.03, 1.0])
@pytest.mark.parametrize("kind", ["gaussian", "ordinal", "categorical"])
def test_it_is_the_trace_of_the_fisher_matrix_over_the_damped_one(kind: str, damping: float) -> None:
    policy, obs = make_policy(kind, hidden=(4,)), randn(BATCH, OBS_DIM, seed=1)
    fisher = fisher_matrix(
        eta_function(policy, obs), lambda p, q: torch_kl(policy.distribution, p, q), policy.theta.vector
    )
    expected = float(torch.linalg.solve(fisher + damping * torch.eye(len(fisher)), fisher).trace())
    generator, estimates = seeded(2), []
    for _ in range(600):
        with torch.no_grad():
            noise = policy.distribution.noise(BATCH, like=obs, generator=generator)
            batch = Batch(obs, policy.distribution.sample(policy(obs), noise), torch.zeros(BATCH))
        estimates.append(
            effective_dimension(
                policy, batch, damping=damping, cg_iterations=300, cg_tolerance=1e-10, generator=generator
            )
        )
    found = torch.tensor(estimates)
    # Four standard errors: a false alarm in 16,000 seeds, and the seed is fixed. Sharp enough to tell a factor of 1.2.
    error = 4 * float(found.std()) / math.sqrt(len(found))
    assert error < 0.2 * expected
    assert abs(float(found.mean()) - expected) <= error


def test_advantages_have_no_say() -> None:
    policy, obs = make_policy(), randn(BATCH, OBS_DIM, seed=1)
    action = policy.distribution.sample(policy(obs).detach(), randn(BATCH, 2, seed=2))
    found = {
        effective_dimension(policy, Batch(obs, action, advantage), damping=0.1, cg_iterations=50, generator=seeded(3))
        for advantage in (torch.zeros(BATCH), randn(BATCH, seed=4))
    }
    assert len(found) == 1


@pytest.fixture
def dimensions(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What `effective_dimension` is to return next, first to last."""
    coming: list[float] = []
    monkeypatch.setattr(trpo.natural_gradient.damping, "effective_dimension", lambda *args, **options: coming.pop(0))
    return coming


def followed(damping: Damping, updates: int) -> list[float]:
    policy, obs = make_policy(), randn(BATCH, OBS_DIM)
    batch, values = Batch(obs, randn(BATCH, 2), torch.zeros(BATCH)), []
    for _ in range(updates):
        damping.follow(policy, batch, generator=seeded())
        values.append(damping.value)
    return values


def test_it_rises_with_the_dimension_every_tenth_update_and_never_falls_below_its_setting(
    dimensions: list[float],
) -> None:
    damping = Damping(settings(damping=0.1, effective_dimension=0.5))
    dimensions += [45.0, 7.5, 3.0, 30.0]  # of 15 wanted: three times too many, half, a fifth, twice
    values = followed(damping, 31)
    assert values == pytest.approx([*10 * [0.3], *10 * [0.15], *10 * [0.1], 0.2], rel=1e-12)


def test_numbers_that_broke_down_leave_it_as_it_is(dimensions: list[float]) -> None:
    damping = Damping(settings(damping=0.1, effective_dimension=0.5))
    dimensions += [math.nan, math.inf]
    assert followed(damping, 11) == 11 * [0.1]


def test_without_a_share_it_is_the_setting_and_costs_nothing(dimensions: list[float]) -> None:
    assert followed(Damping(settings(damping=0.1, effective_dimension=None)), 11) == 11 * [0.1]  # none was asked for


def test_it_goes_on_where_it_was(dimensions: list[float]) -> None:
    whole = Damping(settings(damping=0.1, effective_dimension=0.5))
    dimensions += 3 * [45.0]
    expected = followed(whole, 25)
    dimensions += 3 * [45.0]
    first = Damping(settings(damping=0.1, effective_dimension=0.5))
    start = followed(first, 13)
    second = Damping(settings(damping=0.1, effective_dimension=0.5))
    second.load_state_dict(first.state_dict())
    assert start + followed(second, 12) == expected
