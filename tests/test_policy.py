"""The policy: what its head bounds, what its linearisation differentiates, and that it acts as it is updated."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from helpers import (
    F64,
    OBS_DIM,
    POLICIES,
    make_batch,
    make_mlp,
    make_policy,
    randn,
    relative_error,
    seeded,
)
from torch import Tensor

from trpo.batch import Batch
from trpo.config import Config, NaturalGradientConfig
from trpo.distributions import Categorical, DiagonalGaussian
from trpo.errors import ConfigError
from trpo.natural_gradient import trust_region_step
from trpo.natural_gradient.explicit import eta_function
from trpo.networks.gaussian_heads import GaussianHead, GivenStdHead
from trpo.networks.mlp import MLP
from trpo.normalizer import ObservationNormalizer
from trpo.policy import Policy, build_normalizer, build_policy

BOUNDS = (0.01, 10.0)
# Chains of some tens of float64 operations: units of 2.2e-16, taken a thousandfold.
TOLERANCE = 1e-12


def head(*, state_dependent: bool = False, initial_std: float = 0.6) -> GaussianHead:
    out = 4 if state_dependent else 2
    return GaussianHead(make_mlp([OBS_DIM, 5, out]), 2, initial_std=initial_std, std_bounds=BOUNDS).to(F64)


@pytest.mark.parametrize("initial_std", [0.011, 0.6, 9.9])
def test_a_free_std_starts_at_its_initial_value(initial_std: float) -> None:
    eta = head(initial_std=initial_std)(randn(5, OBS_DIM))
    # The parameter is made in float32, where the inverse of the bound amplifies rounding near its ends.
    torch.testing.assert_close(eta[:, 2:].exp(), torch.full((5, 2), initial_std, dtype=F64), rtol=1e-5, atol=0)


def test_a_state_dependent_std_starts_around_its_initial_value() -> None:
    module = head(state_dependent=True)
    with torch.no_grad():
        module.network.layers[-1].weight.zero_()
    torch.testing.assert_close(
        module(randn(5, OBS_DIM))[:, 2:].exp(), torch.full((5, 2), 0.6, dtype=F64), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("raw", [-1e6, -20.0, -3.0, 0.0, 3.0, 20.0, 1e6])
def test_std_never_leaves_its_bounds(raw: float) -> None:
    module = head()
    with torch.no_grad():
        module.raw_log_std.fill_(raw)
    std = module(randn(1, OBS_DIM))[0, 2:].exp()
    assert (std >= BOUNDS[0] * (1 - TOLERANCE)).all() and (std <= BOUNDS[1] * (1 + TOLERANCE)).all()


def test_bound_slope_is_the_derivative_and_one_in_the_middle() -> None:
    module = head()
    middle = 0.5 * (math.log(BOUNDS[0]) + math.log(BOUNDS[1]))
    raw = torch.linspace(middle - 8, middle + 8, 33, dtype=F64).requires_grad_()
    (expected,) = torch.autograd.grad(module._bound(raw).sum(), raw)
    torch.testing.assert_close(module.bound_slope(raw).detach(), expected, rtol=TOLERANCE, atol=TOLERANCE)
    assert float(module.bound_slope(raw)[16].detach()) == pytest.approx(1.0, abs=TOLERANCE)
    assert (expected > 0).all()  # a σ at its bound can come back


@pytest.mark.parametrize("opaque", [False, True], ids=["closed form", "autograd"])
@pytest.mark.parametrize("kind", POLICIES)
def test_linearisation_is_the_jacobian_in_the_order_of_theta(kind: str, opaque: bool) -> None:
    policy = make_policy(kind, opaque=opaque)
    obs = randn(6, OBS_DIM, seed=4)
    theta, linearization = policy.theta.vector.clone(), policy.linearize(obs)
    jacobian = torch.func.jacrev(eta_function(policy, obs))(theta)
    v, u = randn(len(theta), seed=5), randn(6, policy.distribution.param_dim, seed=6)
    assert relative_error(linearization.output, policy(obs).detach()) <= TOLERANCE
    assert relative_error(linearization.jvp(v), jacobian @ v) <= TOLERANCE
    assert relative_error(linearization.vjp(u), torch.einsum("bkp,bk->p", jacobian, u)) <= TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("kind", POLICIES)
@torch.no_grad()
def test_what_is_linearised_is_bitwise_what_acts(kind: str, dtype: torch.dtype) -> None:
    """So that at θ_old every importance ratio is exactly 1 and the KL exactly 0."""
    policy = make_policy(kind, dtype=dtype)
    batch = make_batch(policy)
    old, new = policy.linearize(batch.obs).output, policy(batch.obs)
    distribution = policy.distribution
    assert torch.equal(distribution.log_prob(old, batch.action), distribution.log_prob(new, batch.action))
    assert (distribution.kl(old, new) == 0).all()


def test_sample_and_mode_see_normalised_observations() -> None:
    policy = make_policy("gaussian")
    raw = 100 + 5 * randn(200, OBS_DIM)
    policy.normalizer.update(raw)
    noise = policy.distribution.noise(200, like=raw, generator=seeded())
    eta = policy((raw - raw.mean(0)) / raw.std(0, correction=0))
    mean, std = eta[:, :2], eta[:, 2:].exp()
    # The normaliser adds 1e-8 to a variance near 25, and moments merge to rounding.
    torch.testing.assert_close(policy.mode(raw), mean.detach(), rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(policy.sample(raw, noise), (mean + std * noise).detach(), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("kind", POLICIES)
def test_a_copy_follows_and_is_a_policy_of_its_own(kind: str, dtype: torch.dtype) -> None:
    policy = make_policy(kind, dtype=dtype)
    copy, raw = policy.copy_on(torch.device("cpu")), 100 + 5 * randn(50, OBS_DIM)
    noise = policy.distribution.noise(50, like=policy.theta.vector, generator=seeded())
    before = copy.sample(raw, noise)
    assert torch.equal(before, policy.sample(raw, noise))
    for step in (1, 2):
        policy.normalizer.update(raw + step)
        policy.theta.assign_(policy.theta.vector + 0.1 * randn(len(policy.theta.vector), seed=step).to(dtype))
        if isinstance(policy.network, GivenStdHead):
            policy.network.set_std(0.1 * step)
        assert not torch.equal(copy.mode(raw), policy.mode(raw)) and torch.equal(copy.sample(raw, noise), before)
        copy.follow(policy)
        before = copy.sample(raw, noise)
        assert torch.equal(before, policy.sample(raw, noise))


@pytest.mark.parametrize("opaque", [False, True], ids=["built in", "any module"])
@pytest.mark.parametrize("raw_dtype", [torch.float32, F64])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("kind", POLICIES)
def test_an_actor_samples_as_the_policy_does(
    kind: str, dtype: torch.dtype, raw_dtype: torch.dtype, opaque: bool
) -> None:
    policy = make_policy(kind, dtype=dtype, opaque=opaque)
    raw = (100 + 5 * randn(4, 50, OBS_DIM)).to(raw_dtype)
    for shift in (0, 1):  # each time with another normaliser
        policy.normalizer.update(raw.flatten(0, 1) + shift)
        noise = policy.distribution.noise(4, 50, like=policy.theta.vector, generator=seeded())
        for part in (slice(0, 50), slice(3, 20)):  # of another process, whose rows lie apart
            actions = [policy.sample(x[part], z[part]) for x, z in zip(raw, noise, strict=True)]
            acted = torch.stack([torch.zeros_like(action) for action in actions])
            obs = torch.zeros_like(raw[:, part])
            act = policy.actor(obs, noise[:, part], acted)
            obs.copy_(raw[:, part])
            for t in (2, 0, 1, 3):
                act(t)
            # The same operations in the same order, whoever does them; but whether a product and a sum are rounded
            # once or twice is up to who compiled a Gaussian's.
            tolerance = 2e-7 if dtype == torch.float32 and kind.startswith("gaussian") else 0
            torch.testing.assert_close(acted, torch.stack(actions), rtol=tolerance, atol=tolerance)


def act_once(policy: Policy, raw: Tensor, noise: Tensor) -> Tensor:
    action = torch.zeros(1, len(raw), policy.distribution.action_dim)
    policy.actor(raw[None], noise[None], action)(0)
    return action[0]


def test_an_actor_without_normalisation_sees_observations_as_they_are() -> None:
    policy = make_policy("gaussian", dtype=torch.float32)
    policy.normalizer.update(100 + 5 * randn(50, OBS_DIM))
    policy.normalizer.enabled = False
    policy.normalizer.clip = 0.1
    raw, noise = randn(200, OBS_DIM), randn(200, 2, seed=1, dtype=torch.float32)
    policy.load_state_dict(policy.state_dict())  # as resuming does, with statistics that are not to be used
    torch.testing.assert_close(act_once(policy, raw, noise), policy.sample(raw, noise), rtol=2e-7, atol=2e-7)


def test_an_actor_asks_code_that_was_overridden() -> None:
    class Twice(MLP):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    class Shifted(ObservationNormalizer):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + 1)

    class Wider(GaussianHead):
        def forward(self, obs: Tensor) -> Tensor:
            return super().forward(obs) + 1

    raw, noise = randn(20, OBS_DIM), randn(20, 2, dtype=torch.float32)
    plain = make_policy("gaussian", dtype=torch.float32)
    assert isinstance(plain.network, GaussianHead)
    for change in ("network", "head", "normalizer"):
        policy = copy.deepcopy(plain)
        if change == "network":
            policy.network.network.__class__ = Twice
        elif change == "head":
            policy.network.__class__ = Wider
        else:
            policy.normalizer.__class__ = Shifted
        actions = act_once(policy, raw, noise)
        assert torch.equal(actions, policy.sample(raw, noise))
        assert not torch.equal(actions, plain.sample(raw, noise))


def test_std_is_reported_only_where_it_is_one_number() -> None:
    policy = make_policy("gaussian")
    expected = policy(randn(1, OBS_DIM))[0, 2:].exp().mean().detach()
    assert policy.std() == pytest.approx(float(expected), rel=TOLERANCE)
    assert math.isnan(make_policy("gaussian_state_std").std())
    assert math.isnan(make_policy("categorical").std())


def test_theta_holds_every_parameter_and_no_statistic() -> None:
    policy = make_policy("gaussian")
    assert len(policy.theta.vector) == sum(p.numel() for p in policy.parameters())
    theta = policy.theta.vector.clone()
    policy.normalizer.update(randn(10, OBS_DIM))
    assert torch.equal(policy.theta.vector, theta)


def test_a_loaded_state_acts_alike_and_stays_behind_theta() -> None:
    source, target = make_policy(seed=1), make_policy(seed=2)
    source.normalizer.update(3 + randn(50, OBS_DIM))
    target.load_state_dict(source.state_dict())
    obs = randn(4, OBS_DIM)
    assert torch.equal(target.mode(obs), source.mode(obs))
    assert torch.equal(target.theta.vector, source.theta.vector)
    target.theta.assign_(torch.zeros_like(target.theta.vector))
    assert (target.mode(obs) == 0).all()


def config(**policy: object) -> Config:
    return Config.model_validate({"env": {"id": "Any-v0"}, "dtype": "float64", "policy": policy})


@pytest.mark.parametrize(
    ("settings", "space", "param_dim"),
    [
        ({"bins": 11}, spaces.Box(-1, 1, (2,)), 22),
        ({"bins": 11}, spaces.Box(-np.inf, np.inf, (2,)), 4),
        ({"bins": 11}, spaces.Discrete(4), 4),
        ({"bins": None}, spaces.Box(-1, 1, (2,)), 4),
        ({}, spaces.MultiDiscrete([2, 5, 3]), 10),
        ({}, spaces.MultiBinary(3), 3),
    ],
)
def test_build_policy_fits_its_spaces(settings: dict[str, Any], space: spaces.Space, param_dim: int) -> None:
    observations = spaces.Box(-1, 1, (OBS_DIM,))
    built = [
        build_policy(config(**settings), observations, space, generator=seeded(), device=torch.device("cpu"))
        for _ in range(2)
    ]
    eta = built[0](randn(5, OBS_DIM))
    assert eta.shape == (5, param_dim) and eta.dtype is F64
    assert torch.equal(eta, built[1](randn(5, OBS_DIM)))


@pytest.mark.parametrize("state_dependent", [False, True])
def test_build_policy_starts_near_a_standard_policy(state_dependent: bool) -> None:
    policy = build_policy(
        config(bins=None, std={"state_dependent": state_dependent, "initial": 0.5, "min": 0.1, "max": 3.0}),
        spaces.Box(-1, 1, (OBS_DIM,)),
        spaces.Box(-1, 1, (2,)),
        generator=seeded(),
        device=torch.device("cpu"),
    )
    assert isinstance(policy.distribution, DiagonalGaussian)
    eta = policy(randn(50, OBS_DIM))
    # Rows of the head have norm 0.01, the 64 tanh units at most norm 8: means and log σ move by 0.08 at most.
    assert eta[:, :2].abs().max() < 0.1
    assert (eta[:, 2:].exp() - 0.5).abs().max() < 0.05
    network = policy.network
    assert isinstance(network, GaussianHead) and (network.low, network.high) == (math.log(0.1), math.log(3.0))


@pytest.mark.parametrize("std", [50.0, {"start": 3.0, "end": 1.0}, {"initial": 0.6, "min": 0.05}])
def test_only_values_between_bounds_have_no_more_than_an_initial_std(std: Any) -> None:
    """The same settings, bins by default, for actions with bounds, of which a policy has bins, and without."""
    arguments = {"generator": seeded(), "device": torch.device("cpu")}
    with pytest.raises(ConfigError, match=r"policy.std: these actions have bounds, .* set policy.bins=null"):
        build_policy(config(std=std), spaces.Box(-1, 1, (OBS_DIM,)), spaces.Box(-1, 1, (2,)), **arguments)
    free = build_policy(config(std=std), spaces.Box(-1, 1, (OBS_DIM,)), spaces.Box(-np.inf, np.inf, (2,)), **arguments)
    first = std if isinstance(std, float) else std.get("start", std.get("initial"))
    assert isinstance(free.distribution, DiagonalGaussian) and free.std() == pytest.approx(first, rel=1e-6)  # float32


def test_an_ordinal_policy_starts_near_a_gaussian_of_the_initial_std() -> None:
    policy = build_policy(
        config(std={"initial": 0.3}, bins=21),
        spaces.Box(-1, 1, (OBS_DIM,)),
        spaces.Box(np.float32([-1.0, 0.0]), np.float32([1.0, 2.0])),
        generator=seeded(),
        device=torch.device("cpu"),
    )
    obs = randn(2000, OBS_DIM)
    action = policy.sample(obs, policy.distribution.noise(len(obs), like=obs, generator=seeded(1)))
    # As for a Gaussian, each of 20 differences of logits moves by 0.08 at most: the mean by a few hundredths.
    assert ((policy.mode(obs) - torch.tensor([0.0, 1.0], dtype=F64)).abs() <= 0.1).all()
    assert ((action.std(0) - 0.3).abs() < 0.03).all()  # four standard errors of 2000 are 0.02


def test_a_given_std_is_what_it_is_set_to_and_no_parameter() -> None:
    policy = build_policy(
        config(bins=None, std={"start": 0.5, "end": 0.1}),
        spaces.Box(-1, 1, (OBS_DIM,)),
        spaces.Box(-1, 1, (2,)),
        generator=seeded(),
        device=torch.device("cpu"),
    )
    head = policy.network
    assert isinstance(head, GivenStdHead)
    assert len(policy.theta.vector) == sum(layer.weight.numel() + len(layer.bias) for layer in head.network.linears)
    for std in (0.5, 0.02):
        assert policy.std() == pytest.approx(std, rel=TOLERANCE)
        assert policy(randn(3, OBS_DIM))[:, 2:].exp().detach().numpy() == pytest.approx(std, rel=TOLERANCE)
        head.set_std(0.02)


def test_build_normalizer_follows_the_config() -> None:
    settings = Config.model_validate(
        {"env": {"id": "Any-v0"}, "dtype": "float64", "normalize": {"observations": False, "clip_observations": 3.0}}
    )
    normalizer = build_normalizer(settings, 2)
    assert (normalizer.enabled, normalizer.clip, normalizer.shift.dtype) == (False, 3.0, F64)


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda policy: pickle.loads(pickle.dumps(policy))])
@pytest.mark.parametrize("kind", POLICIES)
def test_a_copy_acts_alike_and_moves_by_itself(kind: str, again: Callable[[Policy], Policy]) -> None:
    policy, obs = make_policy(kind), randn(5, OBS_DIM)
    policy.normalizer.update(randn(20, OBS_DIM, seed=3))
    other = again(policy)
    assert torch.equal(other.mode(obs), policy.mode(obs))
    before = policy.mode(obs)
    other.theta.assign_(other.theta.vector + 0.1)  # its own vector, behind its own parameters
    other.normalizer.update(9 + randn(20, OBS_DIM, seed=4))
    assert torch.equal(policy.mode(obs), before)
    parameters = torch.cat([p.detach().flatten() for p in other.parameters()])
    assert torch.equal(parameters, policy.theta.vector + 0.1)
    other.load_state_dict(policy.state_dict())  # which refreshes its own normaliser
    assert torch.equal(other.mode(obs), before)


def test_a_pickle_holds_theta_once() -> None:
    policy = make_policy(hidden=(200, 200))
    size = policy.theta.vector.numel() * 8
    assert size < len(pickle.dumps(policy)) < 1.1 * size


def test_a_policy_that_is_all_frozen_acts_and_is_copied() -> None:
    policy, obs = make_policy(), randn(5, OBS_DIM)
    for other in (copy.deepcopy(policy.requires_grad_(False)), pickle.loads(pickle.dumps(policy))):
        assert torch.equal(other.mode(obs), policy.mode(obs)) and other.theta.vector.shape == (0,)


def test_a_policy_that_is_moved_stays_behind_theta() -> None:
    policy = make_policy().float()
    assert policy.theta.vector.dtype == torch.float32
    policy.theta.assign_(policy.theta.vector + 1)
    assert torch.equal(torch.cat([p.flatten() for p in policy.parameters()]), policy.theta.vector)
    batch = make_batch(policy)
    batch = Batch(batch.obs.float(), batch.action.float(), batch.advantage.float())
    before = [p.clone() for p in policy.parameters()]
    assert trust_region_step(policy, batch, max_kl=0.01, settings=NaturalGradientConfig()).accepted
    assert not any(torch.equal(p, was) for p, was in zip(policy.parameters(), before, strict=True))


def test_a_network_without_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="has no parameters, so that there is nothing to train"):
        Policy(torch.nn.Identity(), Categorical([2]), ObservationNormalizer(2, clip=10.0, dtype=F64))
