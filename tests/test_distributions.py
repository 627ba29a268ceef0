"""Each family against torch.distributions, its derivatives against autograd, its metric against two definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from gymnasium import spaces
from helpers import (
    DISCRETE,
    F64,
    FAMILIES,
    INDEXED,
    all_actions,
    randn,
    seeded,
    torch_entropy,
    torch_kl,
    torch_log_prob,
)
from torch import Tensor

from trpo.distributions import Bernoulli, Categorical, DiagonalGaussian, Distribution, Ordinal, distribution_for
from trpo.errors import EnvError

BATCH = 6
SAMPLES = 40_000
# Formulas of a few operations on numbers of size 1 in float64 agree to some units of 2.2e-16.
ROUNDING = {"rtol": 1e-12, "atol": 1e-13}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Distribution:
    return FAMILIES[request.param]


def draw(family: Distribution, eta: Tensor, *, seed: int = 3) -> Tensor:
    return family.sample(eta, family.noise(len(eta), like=eta, generator=seeded(seed)))


def test_log_prob_entropy_and_kl_agree_with_torch(family: Distribution) -> None:
    p, q = randn(BATCH, family.param_dim, seed=1), randn(BATCH, family.param_dim, seed=2)
    action = draw(family, p)
    torch.testing.assert_close(family.log_prob(q, action), torch_log_prob(family, q, action), **ROUNDING)
    torch.testing.assert_close(family.entropy(p), torch_entropy(family, p), **ROUNDING)
    torch.testing.assert_close(family.kl(p, q), torch_kl(family, p, q), **ROUNDING)


def test_any_leading_shape_stands_for_the_batch(family: Distribution) -> None:
    p, q = randn(3, 2, family.param_dim, seed=1), randn(3, 2, family.param_dim, seed=2)
    flat_p, flat_q = p.flatten(0, 1), q.flatten(0, 1)
    noise = family.noise(3, 2, like=p, generator=seeded())
    action = family.sample(p, noise)
    assert action.shape == (3, 2, family.action_dim)
    assert torch.equal(action.flatten(0, 1), family.sample(flat_p, noise.flatten(0, 1)))
    flat_action = action.flatten(0, 1)
    for shaped, flat in (
        (family.mode(p), family.mode(flat_p)),
        (family.log_prob(p, action), family.log_prob(flat_p, flat_action)),
        (family.score(p, action), family.score(flat_p, flat_action)),
        (family.entropy(p), family.entropy(flat_p)),
        (family.kl(p, q), family.kl(flat_p, flat_q)),
        (family.metric(p)(q), family.metric(flat_p)(flat_q)),
    ):
        assert torch.equal(shaped.flatten(0, 1), flat)


def test_score_is_the_gradient_of_torchs_log_prob(family: Distribution) -> None:
    eta = randn(BATCH, family.param_dim).requires_grad_()
    action = draw(family, eta.detach())
    (expected,) = torch.autograd.grad(torch_log_prob(family, eta, action).sum(), eta)
    torch.testing.assert_close(family.score(eta.detach(), action), expected, **ROUNDING)


def metric_matrix(family: Distribution, eta: Tensor) -> Tensor:
    """M [K, K] at one η [K], column by column from products."""
    basis = torch.eye(family.param_dim, dtype=F64)
    return family.metric(eta.expand(family.param_dim, -1))(basis).T


def test_metric_is_the_hessian_of_torchs_kl(family: Distribution) -> None:
    eta = randn(family.param_dim)
    hessian = torch.autograd.functional.hessian(lambda q: torch_kl(family, eta, q), eta)
    torch.testing.assert_close(metric_matrix(family, eta), hessian, **ROUNDING)


@pytest.mark.parametrize("name", DISCRETE)
def test_metric_is_the_expected_outer_product_of_the_score(name: str) -> None:
    family = FAMILIES[name]
    eta, actions = randn(family.param_dim), all_actions(family)
    etas = eta.expand(len(actions), -1)
    probability = family.log_prob(etas, actions).exp()
    score = family.score(etas, actions)
    torch.testing.assert_close(probability.sum(), torch.tensor(1.0, dtype=F64), **ROUNDING)
    torch.testing.assert_close(probability @ score, torch.zeros_like(eta), **ROUNDING)
    torch.testing.assert_close((score.T * probability) @ score, metric_matrix(family, eta), **ROUNDING)


def test_scores_of_drawn_actions_have_mean_zero_and_the_metric_as_covariance(family: Distribution) -> None:
    """What holds only if `sample` draws from the very density that `log_prob` is of."""
    etas = (0.3 * randn(family.param_dim)).expand(SAMPLES, -1)
    score = family.score(etas, draw(family, etas))
    products = score.unsqueeze(2) * score.unsqueeze(1)
    # Four standard errors for each of up to 65 distinct numbers: a false alarm in 240 seeds, and the seed is fixed.
    # Of an entry that is 0 for every action, rounding.
    for drawn, expected in ((score, torch.zeros_like(etas[0])), (products, metric_matrix(family, etas[0]))):
        tolerance = 4 * drawn.std(0) / math.sqrt(SAMPLES) + 1e-12
        assert ((drawn.mean(0) - expected).abs() <= tolerance).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kl_of_a_policy_with_itself_is_exactly_zero(family: Distribution, dtype: torch.dtype) -> None:
    eta = 5 * randn(50, family.param_dim, dtype=dtype)
    assert (family.kl(eta, eta.clone()) == 0).all()


def test_kl_is_positive_and_not_symmetric(family: Distribution) -> None:
    p, q = randn(BATCH, family.param_dim, seed=1), randn(BATCH, family.param_dim, seed=2)
    assert (family.kl(p, q) > 0).all()
    # Far beyond rounding: the inputs of this file tell KL(p ‖ q) from KL(q ‖ p).
    assert (family.kl(p, q) - family.kl(q, p)).abs().max() > 0.01


@pytest.mark.parametrize("name", DISCRETE)
def test_sample_frequencies_match_the_joint_probabilities(name: str) -> None:
    family = FAMILIES[name]
    eta, actions = randn(family.param_dim), all_actions(family)
    drawn = draw(family, eta.expand(SAMPLES, -1))
    frequency = (drawn.unsqueeze(1) == actions).all(-1).double().mean(0)
    p = torch_log_prob(family, eta.expand(len(actions), -1), actions).exp()
    # Four standard deviations of a binomial frequency; joint, so that correlated components would show as well.
    assert ((frequency - p).abs() <= 4 * (p * (1 - p) / SAMPLES).sqrt()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_coin_that_is_nearly_sure_falls_so(dtype: torch.dtype) -> None:
    # Far beyond Φ⁻¹ of what float32 tells from 0 and 1: 5.4 and e^-17. P(Z > 6) is 1e-9, e^-30 is 1e-13.
    noise = torch.tensor([[6.0], [-6.0]], dtype=dtype)
    for eta, expected in ((30.0, [1, 1]), (-30.0, [0, 0]), (20.0, [0, 1]), (-20.0, [0, 1])):
        drawn = Bernoulli(1).sample(torch.full((2, 1), eta, dtype=dtype), noise)
        assert drawn.flatten().tolist() == expected


def test_gaussian_samples_have_the_stated_moments() -> None:
    family, eta = DiagonalGaussian(2), torch.tensor([1.0, -2.0, -1.0, 0.5], dtype=F64)
    drawn = draw(family, eta.expand(SAMPLES, -1))
    mean, std = eta[:2], eta[2:].exp()
    # Four standard errors: σ/√n of a mean, σ²√(2/n) of a variance, 1/√n of a correlation.
    assert ((drawn.mean(0) - mean).abs() <= 4 * std / math.sqrt(SAMPLES)).all()
    assert ((drawn.var(0) - std**2).abs() <= 4 * std**2 * math.sqrt(2 / SAMPLES)).all()
    assert drawn.T.corrcoef()[0, 1].abs() <= 4 / math.sqrt(SAMPLES)


def test_noise_comes_from_the_given_generator_alone(family: Distribution) -> None:
    like = torch.zeros(1, dtype=F64)
    before = torch.get_rng_state()
    first, second = (family.noise(4, 2, like=like, generator=seeded(5)) for _ in range(2))
    assert torch.equal(first, second)
    assert first.dtype == F64 and first.shape[:2] == (4, 2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", INDEXED)
def test_mode_is_the_most_probable_of_all_actions(name: str) -> None:
    family = FAMILIES[name]
    actions = all_actions(family)
    for eta in randn(20, family.param_dim):
        best = torch_log_prob(family, eta.expand(len(actions), -1), actions).argmax()
        assert torch.equal(family.mode(eta), actions[best])


def test_gaussian_mode_is_the_mean() -> None:
    assert torch.equal(DiagonalGaussian(2).mode(torch.tensor([[1.0, 2.0, 3.0, 4.0]])), torch.tensor([[1.0, 2.0]]))


def test_the_action_of_an_ordinal_policy_without_noise_is_the_mean() -> None:
    family = FAMILIES["ordinal"]
    eta, actions = randn(family.param_dim), all_actions(family)
    p = torch_log_prob(family, eta.expand(len(actions), -1), actions).exp()
    torch.testing.assert_close(family.mode(eta), p @ actions, **ROUNDING)


def test_ordinal_samples_rise_with_their_noise() -> None:
    # What makes coloured noise mean something: neighbouring noise gives neighbouring actions.
    family = Ordinal(spaces.Box(-2, 2, (1,), np.float64), 5)
    eta = torch.zeros(101, 5, dtype=F64)
    noise = torch.linspace(-3, 3, 101, dtype=F64)[:, None]
    drawn = family.sample(eta, noise)
    assert (drawn.diff(dim=0) >= 0).all() and sorted(set(drawn.flatten().tolist())) == [-2, -1, 0, 1, 2]
    # Equal probabilities: by hand, the value changes where Φ(noise) passes 0.2, 0.4, 0.6 and 0.8.
    edges = torch.tensor([-0.8416, -0.2533, 0.2533, 0.8416], dtype=F64)
    assert torch.equal(drawn, (noise > edges).sum(-1, keepdim=True) - 2.0)


def test_an_ordinal_policy_can_start_as_a_gaussian() -> None:
    family = Ordinal(spaces.Box(np.array([-2.0, 0.0]), np.array([2.0, 1.0]), dtype=np.float64), 101)
    mean, drawn = family.mode(family.normal(0.1)), draw(family, family.normal(0.1).expand(SAMPLES, -1))
    torch.testing.assert_close(mean, torch.tensor([0.0, 0.5], dtype=F64), **ROUNDING)
    # Four standard errors, which exceed what cut tails (5σ) and bins (0.4σ and less) change.
    assert ((drawn.std(0) - 0.1).abs() <= 4 * 0.1 / math.sqrt(2 * SAMPLES)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # compiled where that was built, and by torch
def test_an_ordinal_policy_that_is_not_a_number_gives_no_action(dtype: torch.dtype) -> None:
    family = FAMILIES["ordinal"]
    eta = randn(BATCH, family.param_dim, dtype=dtype)
    eta[2, 1] = eta[4, 7] = math.nan
    expected = torch.zeros(BATCH, 2, dtype=torch.bool)
    expected[2, 0] = expected[4, 1] = True
    assert torch.equal(draw(family, eta).isnan(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bounds", [(-0.4, 0.4), (-3.0, 3.0), (0.1, 0.7), (1000.0, 1001.0)])
@pytest.mark.parametrize("bins", [2, 11, 51])
def test_an_ordinal_action_is_told_from_its_neighbours(
    bins: int, bounds: tuple[float, float], dtype: torch.dtype
) -> None:
    family = Ordinal(spaces.Box(*bounds, (1,), np.float32), bins)
    # Each value in turn has all the probability: the action drawn must be found to have it.
    eta = torch.where(torch.arange(bins)[:, None] >= torch.arange(bins), 50.0, -50.0).to(dtype)
    eta[:, 0] = 0  # no tilt
    action = draw(family, eta)
    assert len(action.unique()) == bins
    assert (family.log_prob(eta, action).abs() < 1e-6).all()  # of e^-50; rounding of a sum of logits below 2500


@pytest.mark.parametrize(
    ("low", "high", "float32", "float64"),
    [
        (-1.0, 1.0, True, True),
        (0.5, 0.5, True, True),  # one value only
        (1e6, 1e6 + 4, True, True),
        (2e7, 2e7 + 4, False, True),
        (2e16, 2e16 + 4, False, False),
    ],
)
def test_values_that_are_one_number_are_not_told_apart(low: float, high: float, float32: bool, float64: bool) -> None:
    """Between 2^24 and 2^25 float32 knows every second whole number, and float64 beyond 2^54 every fourth."""
    family = Ordinal(spaces.Box(low, high, (1,), np.float64), 11)
    assert (family.tells_apart(torch.float32), family.tells_apart(torch.float64)) == (float32, float64)


@pytest.mark.parametrize("name", DISCRETE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits_stay_finite(name: str, dtype: torch.dtype) -> None:
    family = FAMILIES[name]
    p = 1e4 * randn(BATCH, family.param_dim, seed=1, dtype=dtype).sign() * torch.arange(1, family.param_dim + 1)
    p = p.to(dtype)
    q = -p
    action = draw(family, q)
    values = (
        family.log_prob(p, action),
        family.entropy(p),
        family.kl(p, q),
        family.score(p, action),
        family.metric(p)(torch.ones_like(p)),
        family.mode(p),
    )
    for value in values:
        assert torch.isfinite(value).all()
    assert (family.entropy(p) >= 0).all()


def test_extreme_gaussians_stay_finite() -> None:
    family = DiagonalGaussian(1)
    p = torch.tensor([[1e3, -12.0], [-1e3, 12.0], [0.0, -12.0]])  # float32: σ from 6e-6 to 2e5
    q = torch.tensor([[1e3, 12.0], [1e3, 12.0], [0.0, -11.0]])
    action = draw(family, p)
    for value in (family.log_prob(p, action), family.entropy(p), family.kl(p, q), family.score(p, action)):
        assert torch.isfinite(value).all()


def test_a_saturated_coin_keeps_its_small_kl() -> None:
    # Probabilities of tails 9.4e-14 and 7.6e-10: 1 - p is far below the rounding of p, where a difference of softplus
    # (which torch cuts to the identity above 20) gives a negative KL. By hand: KL = t log(t/s) + (s - t), to O(s²).
    t, s = math.exp(-30), math.exp(-21)
    kl = Bernoulli(1).kl(torch.tensor([[30.0]], dtype=F64), torch.tensor([[21.0]], dtype=F64))
    assert float(kl) == pytest.approx(t * math.log(t / s) + (s - t), rel=1e-6)  # O(s) relative, and rounding of 1


def test_bounds_farther_apart_than_numbers_go_are_none() -> None:
    for bound, space_dtype, float32, float64 in (
        (np.finfo(np.float32).max, np.float32, DiagonalGaussian, Ordinal),
        (np.finfo(np.float64).max, np.float64, DiagonalGaussian, DiagonalGaussian),
        (1e100, np.float64, DiagonalGaussian, Ordinal),
        (1e38, np.float32, Ordinal, Ordinal),
        (np.inf, np.int64, DiagonalGaussian, DiagonalGaussian),  # whose bounds are numbers, as far as the arrays say
    ):
        space = spaces.Box(-bound, bound, (2,), space_dtype)
        for dtype, kind in ((torch.float32, float32), (torch.float64, float64)):
            assert isinstance(distribution_for(space, bins=11, dtype=dtype), kind), (space, dtype)


def test_actions_have_the_type_their_space_needs() -> None:
    for name in INDEXED:
        family = FAMILIES[name]
        assert draw(family, randn(2, family.param_dim)).dtype is torch.int64
        assert family.mode(randn(2, family.param_dim)).dtype is torch.int64
    assert draw(DiagonalGaussian(1), randn(2, 2, dtype=torch.float32)).dtype is torch.float32
    assert draw(FAMILIES["ordinal"], randn(2, 8, dtype=torch.float32)).dtype is torch.float32


@pytest.mark.parametrize(
    ("space", "kind", "action_dim", "param_dim"),
    [
        (spaces.Box(-1, 1, (2, 3)), DiagonalGaussian, 6, 12),
        (spaces.Discrete(5, start=2), Categorical, 1, 5),
        (spaces.MultiDiscrete([2, 5, 3]), Categorical, 3, 10),
        (spaces.MultiBinary(4), Bernoulli, 4, 4),
    ],
)
def test_each_action_space_has_its_family(space: spaces.Space, kind: type, action_dim: int, param_dim: int) -> None:
    family = distribution_for(space)
    assert isinstance(family, kind)
    assert (family.action_dim, family.param_dim) == (action_dim, param_dim)


def test_bins_make_a_bounded_box_ordinal_and_leave_other_spaces_alone() -> None:
    family = distribution_for(spaces.Box(-1, 1, (2, 3)), bins=5)
    assert isinstance(family, Ordinal)
    assert (family.action_dim, family.param_dim) == (6, 30)
    assert isinstance(
        distribution_for(spaces.Box(np.float32([-1, -1]), np.float32([1, np.inf])), bins=5), DiagonalGaussian
    )
    assert isinstance(distribution_for(spaces.Discrete(3), bins=5), Categorical)


def test_an_unsupported_action_space_is_named() -> None:
    with pytest.raises(EnvError, match=r"action space Text is not supported; wrap the environment"):
        distribution_for(spaces.Text(3))


def test_an_ordinal_policy_starts_wide_enough_to_try_the_values_beside_the_middle() -> None:
    """However wide the bounds are beside σ, which is in the unit of the actions."""
    space = spaces.Box(np.array([-1.0, -50.0, -1e6]), np.array([1.0, 50.0, 1e6]), dtype=np.float64)
    family = Ordinal(space, 11)
    drawn = draw(family, family.normal(0.4).expand(SAMPLES, -1))
    # Values 0.2, 10 and 2e5 apart. By hand, σ over that is 2, cut at ±5, and where they lie farther apart 1.
    p = torch.exp(-0.5 * torch.arange(-5.0, 6.0, dtype=F64).square() / torch.tensor([4.0, 1.0, 1.0])[:, None])
    variance = (p / p.sum(-1, keepdim=True) * torch.arange(-5.0, 6.0, dtype=F64).square()).sum(-1)
    std = variance.sqrt() * torch.tensor([0.2, 10.0, 2e5], dtype=F64)
    # Four standard errors of a normal's; tails that are cut have smaller ones.
    assert ((drawn.std(0) - std).abs() <= 4 * std / math.sqrt(2 * SAMPLES)).all()


def test_a_component_of_one_value_only_teaches_nothing_and_breaks_nothing() -> None:
    family = Ordinal(spaces.Box(np.array([-1.0, 0.5]), np.array([1.0, 0.5]), dtype=np.float64), 5)
    eta = randn(40, family.param_dim)
    action = draw(family, eta)
    assert (action[:, 1] == 0.5).all() and torch.equal(family.mode(eta)[:, 1], torch.full((40,), 0.5, dtype=F64))
    for numbers in (family.normal(0.3), family.log_prob(eta, action), family.score(eta, action)):
        assert numbers.isfinite().all()
