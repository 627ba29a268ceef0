"""The dense definitions, against torch.distributions and against what they are said to mean."""

from __future__ import annotations

import pytest
import torch
from helpers import F64, OBS_DIM, POLICIES, make_policy, randn, spd_matrix
from torch import distributions as td

from trpo.natural_gradient.explicit import (
    eta_function,
    fisher_matrix,
    gaussian_kl,
    kl_from,
    metric_distance,
    natural_gradient,
    steepest_direction,
)


def test_metric_distance_is_the_squared_length() -> None:
    metric = torch.tensor([[4.0, 1.0], [1.0, 9.0]])
    assert float(metric_distance(torch.tensor([1.0, 2.0]), metric)) == 4 + 2 * 2 * 1 + 9 * 4
    delta = randn(5)
    assert float(metric_distance(delta, torch.eye(5, dtype=F64))) == pytest.approx(float(delta.norm() ** 2), rel=1e-14)


def test_gaussian_kl_is_torchs() -> None:
    mean_p, mean_q = randn(7, 3, seed=1), randn(7, 3, seed=2)
    std_p, std_q = randn(7, 3, seed=3).exp(), randn(7, 3, seed=4).exp()
    expected = td.kl_divergence(td.Normal(mean_p, std_p), td.Normal(mean_q, std_q)).sum(-1)
    # One formula in two arrangements: float64 rounding.
    torch.testing.assert_close(gaussian_kl(mean_p, std_p, mean_q, std_q), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("kind", POLICIES)
def test_kl_is_half_the_squared_length_to_third_order(kind: str) -> None:
    """KL(δ) = ½ δᵀFδ + O(‖δ‖³), so halving δ divides the error by 8."""
    policy, obs = make_policy(kind), randn(20, OBS_DIM)
    theta, eta_of = policy.theta.vector.clone(), eta_function(policy, obs)
    fisher = fisher_matrix(eta_of, policy.distribution.kl, theta)
    kl = kl_from(eta_of, policy.distribution.kl, theta)
    direction = randn(len(theta), seed=3)
    direction /= direction.norm()

    def error(length: float) -> float:
        delta = length * direction
        return float(kl(theta + delta) - 0.5 * metric_distance(delta, fisher))

    for length in (0.08, 0.04):
        # 8 up to the relative size of the next order, about `length` times a constant of order ten.
        assert error(length) / error(length / 2) == pytest.approx(8, rel=0.25)
    assert abs(error(0.01)) < 0.02 * float(0.5 * metric_distance(0.01 * direction, fisher))


def test_the_kl_and_its_slope_vanish_where_it_starts() -> None:
    policy, obs = make_policy(), randn(20, OBS_DIM)
    theta = policy.theta.vector.clone().requires_grad_()
    kl = kl_from(eta_function(policy, obs), policy.distribution.kl, theta)(theta)
    (slope,) = torch.autograd.grad(kl, theta)
    assert float(kl.detach()) == 0 and slope.abs().max() <= 1e-15


def test_natural_gradient_solves_the_damped_system() -> None:
    fisher, gradient = spd_matrix(torch.logspace(-2, 1, 6, dtype=F64)), randn(6)
    x = natural_gradient(fisher, gradient, damping=0.3)
    torch.testing.assert_close(fisher @ x + 0.3 * x, gradient, rtol=1e-12, atol=1e-12)  # condition 31
    torch.testing.assert_close(natural_gradient(torch.eye(6, dtype=F64), gradient), gradient, rtol=0, atol=0)


def test_no_direction_of_the_same_length_climbs_higher() -> None:
    metric, gradient, radius = spd_matrix(torch.logspace(-2, 1, 6, dtype=F64)), randn(6), 0.3
    best = steepest_direction(metric, gradient, radius=radius)
    assert float(metric_distance(best, metric)) == pytest.approx(radius**2, rel=1e-12)
    others = torch.cat([randn(2000, 6, seed=1), best + 0.05 * randn(2000, 6, seed=2), gradient.unsqueeze(0)])
    lengths = torch.einsum("bi,ij,bj->b", others, metric, others).sqrt()
    climbs = (radius * others / lengths.unsqueeze(1)) @ gradient
    assert climbs.max() < gradient @ best
    assert climbs[-1] < 0.9 * (gradient @ best)  # the plain gradient is far from it
