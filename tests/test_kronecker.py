"""The Kronecker-factored preconditioner against dense matrices and automatic differentiation, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import OBS_DIM, POLICIES, make_batch, make_mlp, make_policy, randn, relative_error, seeded
from torch import Tensor

from trpo.config import NaturalGradientConfig
from trpo.errors import UserError
from trpo.natural_gradient import KroneckerPreconditioner, conjugate_gradient, fisher_product, trust_region_step
from trpo.networks.linearization import Factors

DAMPING = 0.05
ROUNDING = 1e-10  # float64, condition numbers below 1e4


class OneBlock:
    """A linearisation reduced to given factors."""

    def __init__(self, *factors: Factors):
        self.factors = list(factors)

    def kronecker_factors(self, u: Tensor) -> list[Factors]:
        return self.factors


def positive(n: int, seed: int) -> Tensor:
    root = randn(n, n + 2, seed=seed)
    return root @ root.T


def dense(factors: Factors, count: float) -> Tensor:
    """A ⊗ S + λI in the layout of θ (weight row by row, then bias), written out entry by entry."""
    a, s = factors.inputs / count, factors.outputs / count
    m, n = len(s), len(a) - 1
    place = [(i, j) for i in range(m) for j in range(n)] + [(i, n) for i in range(m)]
    out = torch.empty(len(place), len(place), dtype=torch.float64)
    for row, (i, j) in enumerate(place):
        for column, (k, q) in enumerate(place):
            out[row, column] = s[i, k] * a[j, q]
    return out + DAMPING * torch.eye(len(place), dtype=torch.float64)


def test_it_inverts_the_damped_kronecker_product_of_every_block() -> None:
    layer, bias = Factors(positive(4, 1), positive(3, 2)), Factors(positive(1, 3), positive(2, 4))
    count = 7.0
    preconditioner = KroneckerPreconditioner(OneBlock(bias, layer), randn(1), count=count, damping=DAMPING)
    matrix = torch.block_diag(dense(bias, count), dense(layer, count))
    v = randn(len(matrix), seed=5)
    assert relative_error(preconditioner(v), torch.linalg.solve(matrix, v)) < ROUNDING


def test_factors_that_float32_cannot_decompose_are_in_float64_and_such_as_have_no_numbers_give_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As with 500 inputs of which one is 1, where it depends on the version of LAPACK."""
    exact, dtypes = torch.linalg.eigh, []

    def eigh(matrix: Tensor) -> Any:
        dtypes.append(matrix.dtype)
        if matrix.dtype == torch.float32:
            raise torch._C._LinAlgError("did not converge")
        return exact(matrix)

    factors = Factors(positive(4, 1).float(), positive(3, 2).float())
    expected = KroneckerPreconditioner(OneBlock(factors), randn(1), count=5.0, damping=DAMPING)(ones := torch.ones(12))
    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    given = KroneckerPreconditioner(OneBlock(factors), randn(1), count=5.0, damping=DAMPING)(ones)
    assert given.dtype == torch.float32 and dtypes == [torch.float32, torch.float64] * 2
    assert relative_error(given, expected) < 1e-5  # float32, condition numbers below 1e3
    broken = Factors(torch.full_like(factors.inputs, torch.nan), factors.outputs)
    assert KroneckerPreconditioner(OneBlock(broken), randn(1), count=5.0, damping=DAMPING)(ones).isnan().all()


def test_factors_are_second_moments_of_inputs_and_backpropagated_scores() -> None:
    mlp, x, u = make_mlp([3, 5, 4]), randn(6, 3), randn(6, 4, seed=1)
    first, second = mlp.linears
    z = first(x).detach().requires_grad_()
    hidden = torch.tanh(z)
    (delta,) = torch.autograd.grad((second(hidden) * u).sum(), z)
    ones = torch.ones(6, 1, dtype=torch.float64)
    inputs = [torch.cat([h, ones], 1) for h in (x, hidden.detach())]
    for factors, h, d in zip(mlp.linearize(x).kronecker_factors(u), inputs, (delta, u), strict=True):
        assert relative_error(factors.inputs, h.T @ h) < ROUNDING
        assert relative_error(factors.outputs, d.T @ d) < ROUNDING


def test_factors_of_a_free_std_are_as_of_a_bias_one_input_a_sample() -> None:
    policy, x, u = make_policy("gaussian"), randn(6, OBS_DIM), randn(6, 4, seed=1)
    raw, eta = policy.network.raw_log_std, policy(x)
    scores = torch.stack([torch.autograd.grad(eta[i] @ u[i], raw, retain_graph=True)[0] for i in range(6)])
    ones = torch.ones(6, 1, dtype=torch.float64)
    factors = policy.linearize(x).kronecker_factors(u)[0]
    assert relative_error(factors.inputs, ones.T @ ones) < ROUNDING
    assert relative_error(factors.outputs, scores.T @ scores) < ROUNDING


@pytest.mark.parametrize("kind", POLICIES)
def test_few_preconditioned_iterations_come_nearer_the_natural_gradient_than_plain_ones(kind: str) -> None:
    policy = make_policy(kind, hidden=(16, 16))
    # Inputs of very different scale and off centre: what plain CG finds hard.
    obs = randn(400, OBS_DIM) @ torch.diag(torch.tensor([0.1, 1.0, 4.0], dtype=torch.float64)) + 1.5
    linearization, dist = policy.linearize(obs), policy.distribution
    eta = linearization.output
    fisher = fisher_product(linearization, dist, count=400.0)

    def damped(v: Tensor) -> Tensor:
        return fisher(v) + DAMPING * v

    scores = dist.score(eta, dist.sample(eta, dist.noise(400, like=eta, generator=seeded(3))))
    gradient = linearization.vjp(scores * randn(400, 1, seed=4)) / 400
    preconditioner = KroneckerPreconditioner(linearization, scores, count=400.0, damping=DAMPING)

    def improvement(iterations: int, preconditioner: KroneckerPreconditioner | None = None) -> float:
        """Gain per root of KL, gᵀx / √xᵀFx."""
        x = conjugate_gradient(damped, gradient, max_iterations=iterations, preconditioner=preconditioner).x
        return float(gradient @ x / (x @ fisher(x)).sqrt())

    exact = improvement(500)
    assert improvement(500, preconditioner) == pytest.approx(exact, rel=1e-6)  # the same system, solved
    assert improvement(3, preconditioner) > improvement(3)
    assert improvement(3, preconditioner) > 0.8 * exact


@pytest.mark.parametrize("kind", POLICIES)
def test_a_preconditioned_update_takes_the_same_step(kind: str) -> None:
    steps = []
    for preconditioner in (None, "kronecker"):
        policy, batch = make_policy(kind), make_batch(make_policy(kind))
        start = policy.theta.vector.clone()
        settings = NaturalGradientConfig(cg_iterations=300, cg_tolerance=1e-12, preconditioner=preconditioner)
        report = trust_region_step(policy, batch, max_kl=1e-4, settings=settings, generator=seeded(1))
        assert report.accepted
        steps.append(policy.theta.vector - start)
    assert relative_error(steps[1], steps[0]) < 1e-8  # both solve to 1e-12, condition number below 1e4


def test_a_network_without_factors_is_refused_in_words() -> None:
    policy = make_policy(opaque=True)
    settings = NaturalGradientConfig(preconditioner="kronecker")
    with pytest.raises(UserError, match=r"natural_gradient.preconditioner"):
        trust_region_step(policy, make_batch(policy), max_kl=0.01, settings=settings, generator=seeded(1))
