"""Both value fits against independent versions of themselves, and that a failed fit leaves no trace."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers import F64, OBS_DIM, make_mlp, make_policy, randn, relative_error, seeded
from torch import Tensor

from trpo import native
from trpo.config import AdamFitConfig, Config, GaussNewtonFitConfig
from trpo.native import NativeMlp
from trpo.value import (
    AdamFit,
    AverageValue,
    GaussNewtonFit,
    ValueFunction,
    build_value,
    explained_variance,
    mean_squared_error,
)

SIZE = 50


def make_value(*, seed: int = 0, dtype: torch.dtype = F64) -> ValueFunction:
    return ValueFunction(make_mlp([OBS_DIM, 5, 4, 1], seed=seed, dtype=dtype))


def data(seed: int = 1) -> tuple[Tensor, Tensor]:
    obs = randn(SIZE, OBS_DIM, seed=seed)
    return obs, obs.sum(1).sin() + 0.1 * randn(SIZE, seed=seed + 1)


def dense_jacobian(value: ValueFunction, obs: Tensor) -> Tensor:
    """∂V/∂θ [B, P] by torch.func.jacrev."""
    parameters = {name: p.detach() for name, p in value.named_parameters()}
    parts = torch.func.jacrev(lambda values: torch.func.functional_call(value, values, (obs,)))(parameters)
    return torch.cat([part.flatten(1) for part in parts.values()], -1)


def gauss_newton(**changes: object) -> GaussNewtonFit:
    return GaussNewtonFit(GaussNewtonFitConfig.model_validate({"iterations": 1, "cg_iterations": 200, **changes}))


def test_gauss_newton_takes_the_damped_dense_step() -> None:
    value, (obs, target) = make_value(), data()
    theta, jacobian = value.theta.vector.clone(), dense_jacobian(value, obs)
    error = (value(obs) - target).detach()
    matrix = jacobian.T @ jacobian / SIZE + 0.3 * torch.eye(len(theta), dtype=F64)
    expected = torch.linalg.solve(matrix, -jacobian.T @ error / SIZE)
    report = gauss_newton(damping=0.3).fit(value, obs, target, progress=0.0)
    # CG stops at 1e-8 of ‖Jᵀe‖; times the condition number of the matrix, below 100.
    assert relative_error(value.theta.vector - theta, expected) <= 1e-6
    assert (report.steps, report.refused) == (1, 0)
    assert report.loss_before == pytest.approx(float(error.square().mean()), rel=1e-12)
    assert report.loss_after == mean_squared_error(value, obs, target) < report.loss_before


def test_gauss_newton_descends_step_by_step() -> None:
    value, (obs, target) = make_value(), data()
    losses = [gauss_newton().fit(value, obs, target, progress=0.0).loss_after for _ in range(5)]
    again = make_value()
    report = gauss_newton(iterations=5).fit(again, obs, target, progress=0.0)
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.5 * losses[0]
    assert (report.loss_after, report.steps) == (losses[-1], 5)
    assert torch.equal(again.theta.vector, value.theta.vector)


def overshooting() -> tuple[ValueFunction, Tensor, Tensor]:
    """A fit whose undamped full step raises the loss: targets far outside what saturating units can follow."""
    obs, _ = data()
    return make_value(), obs, 30 * (3 * obs[:, 0]).sin()


def test_gauss_newton_halves_a_step_that_overshoots() -> None:
    value, obs, target = overshooting()
    theta = value.theta.vector.clone()
    assert gauss_newton(damping=1e-8, backtracks=0).fit(value, obs, target, progress=0.0).refused == 1
    assert torch.equal(value.theta.vector, theta)
    report = gauss_newton(damping=1e-8, backtracks=30).fit(value, obs, target, progress=0.0)
    assert report.refused == 0 and report.loss_after < report.loss_before


@torch.no_grad()
def test_gauss_newton_refuses_when_the_loss_cannot_fall() -> None:
    value, (obs, _) = make_value(), data()
    theta = value.theta.vector.clone()
    report = gauss_newton(iterations=3).fit(value, obs, value(obs).detach(), progress=0.0)
    assert (report.loss_before, report.loss_after, report.steps, report.refused) == (0, 0, 1, 1)
    assert torch.equal(value.theta.vector, theta)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e200])  # 1e200: the error is finite and its square is not
@pytest.mark.parametrize("kind", ["gauss_newton", "adam"])
def test_a_non_finite_fit_is_undone_bitwise(kind: str, bad: float) -> None:
    value, (obs, target) = make_value(), data()
    theta, target = value.theta.vector.clone(), target.index_fill(0, torch.tensor(3), bad)
    fit = gauss_newton() if kind == "gauss_newton" else adam(value)
    state = fit.state_dict()
    report = fit.fit(value, obs, target, progress=0.0)
    assert report.refused == report.steps > 0
    assert torch.equal(value.theta.vector, theta)
    torch.testing.assert_close(fit.state_dict(), state, rtol=0, atol=0)


def test_a_fit_that_overshoots_all_numbers_reports_the_loss_it_leaves() -> None:
    value, (obs, target) = make_value(), data()
    before = mean_squared_error(value, obs, target)
    report = adam(value, start=1e200).fit(value, obs, target, progress=0.0)  # weights whose products overflow
    assert report.nonfinite and report.refused == report.steps
    assert report.loss_after == report.loss_before == before == mean_squared_error(value, obs, target) < math.inf


def adam(
    value: ValueFunction, *, epochs: int = 3, minibatch_size: int = 16, seed: int = 4, start: float = 0.02
) -> AdamFit:
    return AdamFit(
        AdamFitConfig(epochs=epochs, minibatch_size=minibatch_size),
        value,
        generator=seeded(seed),
        learning_rate=lambda progress: start * (1 - 0.5 * progress),
    )


def test_adam_is_torchs_on_autograd_gradients_of_the_same_minibatches() -> None:
    value, oracle, (obs, target) = make_value(), make_value(), data()
    fit, generator = adam(value), seeded(4)
    optimizer = torch.optim.Adam(oracle.parameters(), lr=0.02, eps=1e-5)
    for progress in (0.0, 1.0):  # the second fit goes on with the moments of the first, at its own learning rate
        report = fit.fit(value, obs, target, progress=progress)
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - 0.5 * progress)
        for _ in range(3):
            for rows in torch.randperm(SIZE, generator=generator).tensor_split(SIZE // 16):
                optimizer.zero_grad()
                (oracle(obs[rows]) - target[rows]).square().mean().backward()
                optimizer.step()
        expected = torch.cat([p.detach().flatten() for p in oracle.parameters()])
        # The same formulas in another order of summation; Adam's division by √v amplifies rounding of small gradients.
        assert relative_error(value.theta.vector, expected) <= 1e-10
        assert (report.steps, report.refused) == (9, 0)
        assert report.loss_after < report.loss_before


@pytest.mark.skipif(not native.available(), reason="the compiled functions were not built")
def test_a_fit_in_one_call_is_its_steps_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    obs, target = (x.float() for x in data())
    fits = []
    for at_once in (True, False):
        if not at_once:
            monkeypatch.setattr(NativeMlp, "fits_to", lambda *_: False)
        value = make_value(dtype=torch.float32)
        fit = adam(value, epochs=3, minibatch_size=16)
        report = fit.fit(value, obs, target, progress=0.0)
        fits.append((value.theta.vector, fit.state_dict(), report))
    (theta, state, report), (expected, steps, expected_report) = fits
    assert torch.equal(theta, expected) and report == expected_report
    assert report.steps == state["steps"] == steps["steps"] == 9
    assert torch.equal(state["mean"], steps["mean"]) and torch.equal(state["square"], steps["square"])


def test_a_batch_smaller_than_a_minibatch_is_one_minibatch() -> None:
    value, (obs, target) = make_value(), data()
    assert adam(value, minibatch_size=10 * SIZE).fit(value, obs, target, progress=0.0).steps == 3


def test_adam_goes_on_after_a_bad_batch_as_if_it_had_not_been() -> None:
    value, oracle, (obs, target) = make_value(), make_value(), data()
    fit, oracle_fit = (adam(v, minibatch_size=SIZE) for v in (value, oracle))  # full batches: no order to keep in step
    for v, f in ((value, fit), (oracle, oracle_fit)):
        f.fit(v, obs, target, progress=0.0)
    moments = fit.state_dict()
    bad = fit.fit(value, obs, torch.full_like(target, math.nan), progress=0.0)
    assert bad.refused == bad.steps
    torch.testing.assert_close(fit.state_dict(), moments, rtol=0, atol=0)
    for v, f in ((value, fit), (oracle, oracle_fit)):
        f.generator.manual_seed(9)  # the refused fit drew from its generator
        f.fit(v, obs, target, progress=0.0)
    assert torch.equal(value.theta.vector, oracle.theta.vector)


def test_adam_resumes_bitwise_from_its_state() -> None:
    value, copy, (obs, target) = make_value(), make_value(seed=8), data()
    fit = adam(value)
    fit.fit(value, obs, target, progress=0.0)
    copy.load_state_dict(value.state_dict())
    resumed = adam(copy)
    resumed.load_state_dict(fit.state_dict())
    resumed.generator.set_state(fit.generator.get_state())
    for v, f in ((value, fit), (copy, resumed)):
        f.fit(v, obs, target, progress=0.5)
    assert torch.equal(copy.theta.vector, value.theta.vector)


@pytest.mark.parametrize("kind", ["gauss_newton", "adam"])
def test_no_fit_touches_the_policy(kind: str) -> None:
    policy, value, (obs, target) = make_policy(), make_value(), data()
    theta = policy.theta.vector.clone()
    memory = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    assert memory.isdisjoint(p.untyped_storage().data_ptr() for p in value.parameters())
    (gauss_newton() if kind == "gauss_newton" else adam(value)).fit(value, obs, target, progress=0.0)
    assert torch.equal(policy.theta.vector, theta)


def test_explained_variance_is_one_minus_the_ratio_of_variances() -> None:
    target, prediction = 5 + randn(200, seed=1), 3 + 0.5 * randn(200, seed=2)
    expected = 1 - np.var((target - prediction).numpy()) / np.var(target.numpy())
    assert explained_variance(prediction, target) == pytest.approx(float(expected), rel=1e-10)
    assert explained_variance(target, target) == 1
    assert explained_variance(target + 7, target) == pytest.approx(1, abs=1e-12)  # a constant offset is not variance
    assert explained_variance(torch.zeros(200, dtype=F64), target) == pytest.approx(0, abs=1e-12)
    assert math.isnan(explained_variance(prediction, torch.full((200,), 0.1, dtype=F64)))


def test_build_value_follows_the_config() -> None:
    config = Config.model_validate(
        {"env": {"id": "Any-v0"}, "dtype": "float64", "value": {"hidden_sizes": [7], "activation": "relu"}}
    )
    value = build_value(config, OBS_DIM, generator=seeded(), device=torch.device("cpu"))
    assert value.network.activation == "relu" and len(value.theta.vector) == 7 * (OBS_DIM + 1) + 8
    assert value(randn(4, OBS_DIM)).shape == (4,) and value(randn(4, OBS_DIM)).dtype is F64


@torch.no_grad()  # where the average is evaluated too: tanh rounds otherwise there
def predictions(value: ValueFunction, obs: Tensor) -> Tensor:
    return value(obs)


def test_the_average_over_fits_is_plain_at_first_and_exponential_then() -> None:
    value = make_value()
    average = AverageValue(value, decay=0.75)
    obs = randn(6, OBS_DIM)
    assert torch.equal(average(obs), predictions(value, obs))  # before any fit: V itself
    fits = [randn(len(value.theta.vector), seed=seed) for seed in range(6)]
    for theta in fits:
        value.theta.assign_(theta)
        average.update(value)
    plain = sum(fits[:4]) / 4  # 1/(1 − 0.75) of them count alike
    expected = make_value()
    expected.theta.assign_(0.75 * (0.75 * plain + 0.25 * fits[4]) + 0.25 * fits[5])
    torch.testing.assert_close(average(obs), predictions(expected, obs), rtol=0, atol=1e-12)  # sums in another order
    assert torch.equal(value.theta.vector, fits[-1])  # V itself is left alone


def test_without_decay_the_average_is_the_last_fit() -> None:
    value = make_value()
    average = AverageValue(value, decay=0.0)
    obs = randn(6, OBS_DIM)
    for seed in range(3):
        value.theta.assign_(randn(len(value.theta.vector), seed=seed))
        average.update(value)
        assert torch.equal(average(obs), predictions(value, obs))


def test_the_average_goes_on_from_its_state() -> None:
    value = make_value()
    average, resumed = AverageValue(value, decay=0.9), AverageValue(make_value(seed=7), decay=0.9)
    obs = randn(6, OBS_DIM)
    for seed in range(6):
        value.theta.assign_(randn(len(value.theta.vector), seed=seed))
        if seed == 3:
            resumed.load_state_dict(average.state_dict())
        average.update(value)
        resumed.update(value)
    assert torch.equal(average(obs), resumed(obs))
