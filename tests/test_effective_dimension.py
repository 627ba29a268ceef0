"""The effective dimension against the dense Fisher matrix."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import OBS_DIM, make_policy, randn, seeded, torch_kl

from trpo.batch import Batch
from trpo.natural_gradient import effective_dimension
from trpo.natural_gradient.explicit import eta_function, fisher_matrix

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
