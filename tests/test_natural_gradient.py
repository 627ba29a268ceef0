"""Fisher products and the TRPO step against dense definitions, and every way a step can end."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    F64,
    OBS_DIM,
    POLICIES,
    Opaque,
    make_batch,
    make_mlp,
    make_policy,
    randn,
    relative_error,
    seeded,
    settings,
    surrogate_and_kl,
    torch_kl,
)
from torch import Tensor

from trpo.batch import Batch
from trpo.config import NaturalGradientConfig
from trpo.distributions import Categorical
from trpo.natural_gradient import (
    CGSolution,
    CGStatus,
    KroneckerPreconditioner,
    Outcome,
    Rejection,
    StepReport,
    blind_direction,
    fisher_product,
    trust_region_step,
)
from trpo.natural_gradient.explicit import eta_function, fisher_matrix, metric_distance, natural_gradient
from trpo.natural_gradient.kronecker import HasFactors
from trpo.natural_gradient.line_search import LineSearchResult, backtracking_line_search
from trpo.networks.mlp import ACTIVATIONS
from trpo.normalizer import ObservationNormalizer
from trpo.policy import Policy

MAX_KL = 0.01


@pytest.fixture(params=["looked at", "blind"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step here by a direction that is looked at on the way, and by one that a device finds on its own."""
    usual = trust_region_step

    def blind(policy: Policy, batch: Batch, *, settings: NaturalGradientConfig, **options: Any) -> StepReport:
        alone = settings.preconditioner is None and settings.fisher_subsample == 1
        direction = partial(blind_direction, policy) if alone else None
        return usual(policy, batch, settings=settings, direction=direction, **options)

    if request.param == "blind":
        monkeypatch.setitem(globals(), "trust_region_step", blind)


def dense_fisher(policy: Policy, obs: Tensor) -> Tensor:
    """The Hessian of torch's own mean KL at the policy's θ."""
    kl = lambda p, q: torch_kl(policy.distribution, p, q)  # noqa: E731
    return fisher_matrix(eta_function(policy, obs), kl, policy.theta.vector.clone())


def dense_gradient(policy: Policy, batch: Batch) -> Tensor:
    """The derivative of the importance-weighted surrogate at θ_old, by autograd through torch.distributions."""
    theta = policy.theta.vector.clone().requires_grad_()
    gain, _ = surrogate_and_kl(policy, batch, policy.theta.vector.clone(), theta)
    return torch.autograd.grad(gain, theta)[0]


# ------------------------------------------------------------------ Fisher products


@pytest.mark.parametrize("opaque", [False, True], ids=["closed form", "autograd"])
@pytest.mark.parametrize("kind", POLICIES)
def test_fisher_product_is_the_hessian_of_the_kl(kind: str, opaque: bool) -> None:
    policy, obs = make_policy(kind, opaque=opaque), randn(30, OBS_DIM)
    product = fisher_product(policy.linearize(obs), policy.distribution, count=30)
    v = randn(len(policy.theta.vector), seed=3)
    # Two derivations in float64, each of some thousand roundings of 2.2e-16.
    assert relative_error(product(v), dense_fisher(policy, obs) @ v) <= 1e-10


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_fisher_product_is_the_hessian_of_the_kl_for_every_activation(activation: str) -> None:
    policy, obs = make_policy(activation=activation, hidden=(6, 5, 4)), randn(30, OBS_DIM)
    product = fisher_product(policy.linearize(obs), policy.distribution, count=30)
    v = randn(len(policy.theta.vector), seed=3)
    assert relative_error(product(v), dense_fisher(policy, obs) @ v) <= 1e-10


@pytest.mark.parametrize("opaque", [False, True], ids=["closed form", "autograd"])
def test_fisher_product_gives_the_same_bits_again_and_outlives_a_move(opaque: bool) -> None:
    policy, obs = make_policy(opaque=opaque), randn(30, OBS_DIM)
    product = fisher_product(policy.linearize(obs), policy.distribution, count=30)
    v, w = randn(2, len(policy.theta.vector), seed=3)
    first, kept = product(v).clone(), v.clone()
    product(w)
    assert torch.equal(product(v), first) and torch.equal(v, kept)
    policy.theta.assign_(policy.theta.vector + 1)
    assert torch.equal(product(v), first)


def test_fisher_product_does_not_depend_on_how_samples_are_chunked() -> None:
    policy, obs = make_policy(), randn(30, OBS_DIM)
    v = randn(len(policy.theta.vector), seed=3)
    whole = fisher_product(policy.linearize(obs), policy.distribution, count=30)(v)
    parts = [fisher_product(policy.linearize(part), policy.distribution, count=30)(v) for part in obs.split([7, 23])]
    assert relative_error(sum(parts), whole) <= 1e-13


# ------------------------------------------------------------------ the accepted step


def step(policy: Policy, batch: Batch, *, max_kl: float = MAX_KL, **changes: object) -> StepReport:
    return trust_region_step(policy, batch, max_kl=max_kl, settings=settings(**changes))


@pytest.mark.parametrize("opaque", [False, True], ids=["closed form", "autograd"])
@pytest.mark.parametrize("kind", POLICIES)
def test_the_step_is_the_dense_natural_gradient_on_the_boundary(kind: str, opaque: bool) -> None:
    policy = make_policy(kind, opaque=opaque)
    batch = make_batch(policy)
    theta, fisher, gradient = (
        policy.theta.vector.clone(),
        dense_fisher(policy, batch.obs),
        dense_gradient(policy, batch),
    )
    direction = natural_gradient(fisher, gradient, damping=0.1)
    full = direction * torch.sqrt(2 * MAX_KL / metric_distance(direction, fisher))
    report = step(policy, batch)
    assert report.outcome is Outcome.ACCEPTED and report.cg.status is CGStatus.CONVERGED
    # CG stops at 1e-13; the condition number of F + 0.1·I is below 1e3 here.
    assert relative_error(policy.theta.vector - theta, report.scale * full) <= 1e-9
    assert report.gradient_norm == pytest.approx(float(gradient.norm()), rel=1e-10)
    assert report.step_norm == pytest.approx(float(report.scale * full.norm()), rel=1e-9)
    assert report.expected_gain == pytest.approx(float(report.scale * gradient @ full), rel=1e-9)
    assert report.quadratic_kl == pytest.approx(float(0.5 * report.scale**2 * metric_distance(full, fisher)), rel=1e-9)


@pytest.mark.parametrize("kind", POLICIES)
def test_every_accepted_step_improves_within_the_bound_by_an_independent_count(kind: str) -> None:
    policy = make_policy(kind)
    for i in range(8):
        batch, theta = make_batch(policy, seed=10 * i), policy.theta.vector.clone()
        report = step(policy, batch, max_kl=0.02)
        gain, kl = surrogate_and_kl(policy, batch, theta, policy.theta.vector.clone())
        assert report.accepted and not torch.equal(policy.theta.vector, theta)
        assert 0 < float(kl) <= 0.02 * (1 + 1e-12)  # no slack but the rounding of the two ways to compute it
        assert report.kl == pytest.approx(float(kl), rel=1e-9) and report.gain == pytest.approx(float(gain), rel=1e-9)
        assert report.gain > 0
        assert report.quadratic_kl == pytest.approx(report.scale**2 * 0.02, rel=1e-14)
        assert report.scale == 0.8 ** (report.search.tries - 1)


def test_at_theta_old_the_ratio_is_one_and_the_kl_zero() -> None:
    """Seen from inside: an NPG step of length zero to rounding has gain and KL of zero to its square."""
    policy = make_policy()
    batch = make_batch(policy)
    report = step(policy, batch, max_kl=1e-30, line_search={"enabled": False})
    # Step ~ √(2·1e-30) = 1e-15 in metric length: one rounding of θ, so gain ~ 1e-15 and KL ~ 1e-30.
    assert abs(report.gain) < 1e-13 and abs(report.kl) < 1e-28


def test_damping_shortens_the_directions_the_metric_hardly_sees() -> None:
    """Without damping the step is F⁺g, with a large one it points along g."""
    cosines = []
    for damping in (1e-3, 1.0, 1e6):
        policy = make_policy()
        batch = make_batch(policy)
        theta, gradient = policy.theta.vector.clone(), dense_gradient(policy, batch)
        assert step(policy, batch, damping=damping, max_kl=1e-4).accepted
        moved = policy.theta.vector - theta
        cosines.append(float(moved @ gradient / moved.norm() / gradient.norm()))
    assert cosines == sorted(cosines) and cosines[0] < 0.9
    assert cosines[-1] == pytest.approx(1, abs=1e-9)


def test_a_float32_step_keeps_the_bound_by_the_independent_count_too() -> None:
    policy = make_policy(dtype=torch.float32)
    batch = make_batch(policy, size=200)
    theta = policy.theta.vector.clone()
    report = trust_region_step(policy, batch, max_kl=MAX_KL, settings=settings(cg_iterations=15, cg_tolerance=1e-8))
    _, kl = surrogate_and_kl(policy, batch, theta, policy.theta.vector.clone())
    assert report.accepted
    # A KL of 0.01 as the mean of float32 terms of size 1e-2 with rounding 6e-8 of numbers of size 1.
    assert float(kl) == pytest.approx(report.kl, rel=1e-4) and report.kl <= MAX_KL


def far_step(**line_search: object) -> tuple[StepReport, Tensor]:
    """A step (and how θ moved) so long that the full one overshoots the bound by a fifth."""
    policy = make_policy("gaussian_state_std")
    theta = policy.theta.vector.clone()
    report = step(policy, make_batch(policy), max_kl=0.3, line_search=line_search)
    return report, policy.theta.vector - theta


def test_natural_policy_gradient_mode_takes_the_full_step_unchecked() -> None:
    report, _ = far_step(enabled=False)
    assert report.accepted and (report.scale, report.search.tries, report.search.rejections) == (1.0, 1, ())
    assert report.quadratic_kl == 0.3 and report.kl > 1.1 * 0.3


def test_the_search_shortens_the_full_step_and_its_result_is_what_moves_theta() -> None:
    (_, full), (report, moved) = far_step(enabled=False), far_step()
    assert report.search.rejections == (Rejection.KL,) and report.scale == 0.8
    assert report.kl <= 0.3
    assert relative_error(moved, 0.8 * full) <= 1e-12  # θ is stored as a sum: rounding of θ
    assert float(moved.norm()) == pytest.approx(report.step_norm, rel=1e-12)


# ------------------------------------------------------------------ the Fisher subsample


def subsampled(share: float, *, max_kl: float = 1e-4, seed: int = 5) -> tuple[StepReport, Tensor, Policy, Batch]:
    policy = make_policy()
    batch, theta = make_batch(policy, size=200), policy.theta.vector.clone()
    report = trust_region_step(
        policy, batch, max_kl=max_kl, settings=settings(fisher_subsample=share), generator=seeded(seed)
    )
    return report, policy.theta.vector - theta, policy, batch


def test_the_subsample_thins_the_fisher_matrix_only() -> None:
    (whole, full, _, _), (thinned, moved, policy, batch) = subsampled(1.0), subsampled(0.2)
    assert thinned.accepted
    assert thinned.gradient_norm == whole.gradient_norm  # bitwise: the same rows in the same order
    theta = policy.theta.vector - moved
    gain, kl = surrogate_and_kl(policy, batch, theta, policy.theta.vector.clone())
    assert thinned.gain == pytest.approx(float(gain), rel=1e-7) and thinned.kl == pytest.approx(float(kl), rel=1e-7)
    rows = torch.randperm(200, generator=seeded(5))[:40]
    policy.theta.assign_(theta)
    direction = natural_gradient(dense_fisher(policy, batch.obs[rows]), dense_gradient(policy, batch), damping=0.1)
    assert relative_error(moved / moved.norm(), direction / direction.norm()) <= 1e-7
    assert relative_error(moved / moved.norm(), full / full.norm()) > 1e-3


def test_the_preconditioner_of_a_subsample_has_the_scores_of_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    class Watched(KroneckerPreconditioner):
        def __init__(self, linearization: HasFactors, scores: Tensor, **options: object) -> None:
            given.append(scores)
            super().__init__(linearization, scores, **options)

    monkeypatch.setattr("trpo.natural_gradient.direction.KroneckerPreconditioner", Watched)
    policy = make_policy()
    batch = make_batch(policy, size=200)
    scores = policy.distribution.score(policy(batch.obs), batch.action)
    chosen = settings(fisher_subsample=0.2, preconditioner="kronecker")
    trust_region_step(policy, batch, max_kl=1e-4, settings=chosen, generator=seeded(5))
    assert torch.equal(given[0], scores[torch.randperm(200, generator=seeded(5))[:40]])


def test_the_subsample_follows_its_generator() -> None:
    moves = [subsampled(0.2, seed=seed)[1] for seed in (5, 5, 6)]
    assert torch.equal(moves[0], moves[1]) and not torch.equal(moves[0], moves[2])


def test_a_subsample_holds_one_row_at_least() -> None:
    assert subsampled(1e-6)[0].cg.iterations > 0


# ------------------------------------------------------------------ every way not to step


def refused(policy: Policy, batch: Batch, **options: object) -> StepReport:
    """A step that has to be refused: θ bitwise as before, no number of an accepted step reported."""
    theta = policy.theta.vector.clone()
    report = step(policy, batch, **options)
    assert not report.accepted and torch.equal(policy.theta.vector, theta)
    assert torch.equal(torch.cat([p.detach().flatten() for p in policy.parameters()]), theta)
    assert report.scale == 0
    for number in (report.step_norm, report.expected_gain, report.gain, report.quadratic_kl, report.kl):
        assert math.isnan(number)
    return report


def test_equal_advantages_of_zero_end_with_zero_gradient() -> None:
    policy = make_policy()
    report = refused(policy, replace(make_batch(policy), advantage=torch.zeros(40, dtype=F64)))
    assert (report.outcome, report.gradient_norm, report.reason) == (Outcome.ZERO_GRADIENT, 0.0, "zero gradient")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_one_bad_advantage_ends_with_a_non_finite_gradient(bad: float) -> None:
    policy, batch = (p := make_policy()), make_batch(p)
    batch.advantage[7] = bad
    assert refused(policy, batch).outcome is Outcome.NONFINITE_GRADIENT


def test_an_overflowing_metric_ends_with_a_non_finite_product() -> None:
    # σ = 1e-20 is a float32, its metric 1/σ² = 1e40 is not; with actions at the mean the score itself is finite.
    policy = make_policy(dtype=torch.float32, std_bounds=(1e-22, 1.0), initial_std=1e-20)
    batch = make_batch(policy)
    batch = replace(batch, action=policy.linearize(batch.obs).output[:, :2])
    report = refused(policy, batch)
    assert report.outcome is Outcome.NONFINITE_PRODUCT and math.isfinite(report.gradient_norm)


def saturated() -> tuple[Policy, Batch]:
    """Logits 0 and 800: the second probability is 1 and the metric 0, while the score of the first action is not."""
    network = torch.nn.Linear(OBS_DIM, 2, dtype=F64)
    with torch.no_grad():
        network.weight.zero_()
        network.bias.copy_(torch.tensor([0.0, 800.0]))
    policy = Policy(network, Categorical([2]), ObservationNormalizer(OBS_DIM, clip=10.0, dtype=F64))
    return policy, Batch(randn(10, OBS_DIM), torch.zeros(10, 1, dtype=torch.int64), torch.ones(10, dtype=F64))


def test_a_system_that_is_solved_to_rounding_is_solved() -> None:
    """Undamped and in float32, CG goes on until rounding makes pᵀAp ≤ 0; what it has by then is F⁻¹g."""

    def make(dtype: torch.dtype) -> Policy:
        return make_policy("categorical", hidden=(), dtype=dtype)

    exact, policy = make(F64), make(torch.float32)
    exact.theta.assign_(policy.theta.vector.double())
    batch = make_batch(policy, 64)
    wide = Batch(batch.obs.double(), batch.action, batch.advantage.double())
    gradient, fisher = dense_gradient(exact, wide), dense_fisher(exact, wide.obs)
    # Softmax leaves four directions of sixteen without a metric; the others' eigenvalues are above 1e-3.
    x = torch.linalg.pinv(fisher, rcond=1e-6) @ gradient
    expected = float(gradient @ x * (2 * MAX_KL / (x @ fisher @ x)).sqrt())
    options = settings(damping=0.0, cg_iterations=100, cg_tolerance=0.0)
    report = trust_region_step(policy, batch, max_kl=MAX_KL, settings=options)
    assert report.cg.status is CGStatus.NONPOSITIVE_CURVATURE and report.cg.iterations >= 12
    assert report.accepted and report.expected_gain / report.scale == pytest.approx(expected, rel=1e-4)  # of float32


def test_what_cg_has_when_it_breaks_down_far_from_a_solution_is_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make_policy()

    def broken(*args: object, **options: object) -> CGSolution:
        x = torch.ones_like(policy.theta.vector)
        return CGSolution(x, 0.5 * x, 0.5, 3, CGStatus.NONPOSITIVE_CURVATURE, torch.ones(3, dtype=F64))

    for name in ("conjugate_gradient", "solution"):
        monkeypatch.setattr(f"trpo.natural_gradient.direction.{name}", broken)
    report = refused(policy, make_batch(policy))
    assert report.outcome is Outcome.NONPOSITIVE_CURVATURE and report.numerics_failed


def test_a_gradient_whose_square_is_below_all_numbers_is_none() -> None:
    policy = make_policy("categorical", dtype=torch.float32)
    batch = make_batch(policy)
    report = refused(policy, replace(batch, advantage=1e-21 * batch.advantage))
    assert report.outcome is Outcome.ZERO_GRADIENT and not report.numerics_failed


def test_a_metric_of_zero_ends_with_non_positive_curvature() -> None:
    report = refused(*saturated(), damping=0.0)
    assert report.outcome is Outcome.NONPOSITIVE_CURVATURE and report.cg.iterations == 0
    assert str(report.outcome) == "non-positive curvature"


def test_a_policy_all_but_certain_has_no_curvature_and_nothing_broke() -> None:
    report = refused(*saturated(), damping=0.1)
    assert report.outcome is Outcome.NO_CURVATURE and not report.numerics_failed
    assert report.cg.status is CGStatus.CONVERGED and report.gradient_norm > 0


def test_curvature_that_is_negative_beyond_rounding_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """F = −0.2 I beside a damping of 0.3: the sum is positive for CG, F is not."""
    product = lambda *args, **options: lambda v: -0.2 * v  # noqa: E731
    monkeypatch.setattr("trpo.natural_gradient.direction.fisher_product", product)
    report = refused(*saturated(), damping=0.3)
    assert report.outcome is Outcome.NONPOSITIVE_CURVATURE and report.numerics_failed


def test_curvature_far_below_the_damping_is_not_lost_to_rounding() -> None:
    """σ = 1e4: the metric is 1e-8, and of Fx = g − λx no digit is left in float32."""
    make = lambda dtype: make_policy("gaussian_given_std", initial_std=1e4, dtype=dtype)  # noqa: E731
    exact, policy = make(F64), make(torch.float32)
    exact.theta.assign_(policy.theta.vector.double())
    batch = make_batch(policy)
    wide = Batch(*(x.double() for x in (batch.obs, batch.action, batch.advantage)))
    gradient, fisher = dense_gradient(exact, wide), dense_fisher(exact, wide.obs)
    x = torch.linalg.solve(fisher + torch.eye(len(gradient)), gradient)
    expected = float(gradient @ x * (2 * MAX_KL / (x @ fisher @ x)).sqrt())
    report = trust_region_step(policy, batch, max_kl=MAX_KL, settings=settings(damping=1.0, cg_tolerance=1e-6))
    # A product and a gradient in float32, sums of forty samples.
    assert report.expected_gain / report.scale == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("kind", "options", "rejection", "reason"),
    [
        ("gaussian_state_std", {"max_kl": 0.3}, Rejection.KL, "KL above the bound"),
        ("gaussian", {"max_kl": 3.0}, Rejection.IMPROVEMENT, "too little improvement of the surrogate"),
        ("gaussian", {"max_kl": 1e308}, Rejection.NONFINITE, "non-finite surrogate or KL"),  # 2δ overflows
    ],
)
def test_an_exhausted_search_says_what_was_wrong(
    kind: str, options: dict[str, float], rejection: Rejection, reason: str
) -> None:
    policy = make_policy(kind)
    report = refused(policy, make_batch(policy), line_search={"backtracks": 0}, **options)
    assert report.outcome is Outcome.NO_CANDIDATE and report.search.rejections == (rejection,)
    assert report.reason == f"line search exhausted: last candidate had {reason}"


def test_the_accept_ratio_reaches_the_search() -> None:
    policy = make_policy()
    batch = make_batch(policy)
    # At δ = 0.3 the full step of this problem gains 38 % of its first-order prediction.
    report = refused(policy, batch, max_kl=0.3, line_search={"backtracks": 0, "accept_ratio": 0.5})
    assert report.search.rejections == (Rejection.IMPROVEMENT,)
    assert step(policy, batch, max_kl=0.3, line_search={"backtracks": 0, "accept_ratio": 0.3}).accepted


def test_an_overflowing_step_without_search_is_never_left_in_place() -> None:
    policy = make_policy()
    report = refused(policy, make_batch(policy), max_kl=1e308, line_search={"enabled": False})
    assert report.outcome is Outcome.NONFINITE_STEP and report.reason == "non-finite surrogate or KL"


def test_without_search_a_finite_gain_does_not_excuse_a_kl_that_is_infinite() -> None:
    """Advantages that ask for a smaller σ: its square falls to 0, log π to −∞, and each ratio to 0."""
    policy = make_policy(std_bounds=(1e-300, 1e300))
    batch = make_batch(policy)
    mean, _ = policy(batch.obs).detach().chunk(2, -1)
    batch = replace(batch, advantage=1 - (batch.action - mean).square().sum(-1))
    report = refused(policy, batch, max_kl=1e6, line_search={"enabled": False})
    assert report.outcome is Outcome.NONFINITE_STEP and report.numerics_failed
    assert math.isfinite(report.search.gain) and report.search.kl == math.inf


def test_the_outcomes_are_those_produced_in_this_file() -> None:
    """A new outcome needs a test of its own in this file."""
    assert set(Outcome) - {Outcome.RESTED} == {  # which is the agent's: no step was tried
        Outcome.ACCEPTED,
        Outcome.ZERO_GRADIENT,
        Outcome.NONFINITE_GRADIENT,
        Outcome.NONFINITE_PRODUCT,
        Outcome.NONPOSITIVE_CURVATURE,
        Outcome.NO_CURVATURE,
        Outcome.NO_CANDIDATE,
        Outcome.NONFINITE_STEP,
    }


def test_a_step_draws_no_random_number_and_leaves_the_batch_alone() -> None:
    policy = make_policy()
    batch, state = make_batch(policy), torch.get_rng_state()
    kept = Batch(batch.obs.clone(), batch.action.clone(), batch.advantage.clone())
    step(policy, batch)
    assert torch.equal(torch.get_rng_state(), state)
    for before, after in ((kept.obs, batch.obs), (kept.action, batch.action), (kept.advantage, batch.advantage)):
        assert torch.equal(before, after)


def test_the_example_of_a_network_of_ones_own_in_the_docs_works(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[1] / "docs" / "python.md").read_text()
    (example,) = (part.split("```")[0] for part in page.split("```python\n") if "trust_region_step" in part)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        exec(example, {})
    outcome, kl, gain = capsys.readouterr().out.split()
    assert outcome == "accepted" and 0 < float(kl) <= 0.01 and float(gain) > 0


def test_theta_ends_where_the_report_says_whichever_candidate_was_evaluated_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def looks_further(evaluate: Callable[[float], tuple[float, float]], **rest: Any) -> LineSearchResult:
        result = backtracking_line_search(evaluate, **rest)
        evaluate(0.1)
        return result

    plain, other = make_policy(), make_policy()
    step(plain, make_batch(plain))
    monkeypatch.setattr("trpo.natural_gradient.step.backtracking_line_search", looks_further)
    assert step(other, make_batch(other)).accepted
    assert torch.equal(plain.theta.vector, other.theta.vector)


@pytest.mark.parametrize("opaque", [False, True])
def test_frozen_parameters_stay_and_the_others_take_their_own_natural_gradient_step(opaque: bool) -> None:
    """The dense natural gradient of the free parameters alone, from the policy as a function of them."""
    network = make_mlp([3, 6, 5, 4])
    for parameter in network.linears[1].parameters():
        parameter.requires_grad_(False)
    network_or_opaque = Opaque(network) if opaque else network
    policy = Policy(network_or_opaque, Categorical([4]), ObservationNormalizer(3, clip=10.0, dtype=F64))
    free = sum(p.numel() for p in network.parameters() if p.requires_grad)
    assert len(policy.theta.vector) == free == (3 + 1) * 6 + (5 + 1) * 4
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    theta, batch = policy.theta.vector.clone(), make_batch(policy, size=60)
    fisher, gradient = dense_fisher(policy, batch.obs), dense_gradient(policy, batch)
    report = step(policy, batch, damping=1e-3, cg_iterations=2 * free, max_kl=1e-6)
    assert report.accepted
    for layer in (0, 2):
        assert not torch.equal(network.linears[layer].weight, before[f"layers.{layer}.weight"])
    assert torch.equal(network.linears[1].weight, before["layers.1.weight"])
    expected = natural_gradient(fisher, gradient, damping=1e-3)
    moved = policy.theta.vector - theta
    # The direction, by a solve of a matrix of condition 1e3 or less and by CG to its end.
    assert float(moved @ expected / moved.norm() / expected.norm()) == pytest.approx(1, abs=1e-8)


@pytest.mark.parametrize("max_kl", [0.0, -1.0, math.nan])
def test_a_bound_that_is_none_is_refused(max_kl: float) -> None:
    policy = make_policy()
    with pytest.raises(ValueError, match="max_kl has to be above 0"):
        step(policy, make_batch(policy), max_kl=max_kl)


@pytest.mark.parametrize(
    ("part", "change", "problem"),
    [
        ("advantage", lambda x: x[:1], r"advantage is \[1\]; 40 observations of this policy have \[40\]"),
        ("action", lambda x: x[:, :1], r"action is \[40, 1\]; 40 observations of this policy have \[40, 2\]"),
        ("advantage", lambda x: x.float(), "advantage is torch.float32, θ is torch.float64"),
        ("obs", lambda x: x.float(), "obs is torch.float32, θ is torch.float64"),
    ],
)
@pytest.mark.parametrize("opaque", [False, True], ids=["closed form", "autograd"])
def test_a_batch_that_is_not_the_policys_is_refused(part: str, change: Any, problem: str, opaque: bool) -> None:
    policy = make_policy(opaque=opaque)
    batch = make_batch(policy)
    with pytest.raises(ValueError, match=problem):
        step(policy, replace(batch, **{part: change(getattr(batch, part))}))


def test_an_interrupted_line_search_leaves_theta_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make_policy()
    batch, theta = make_batch(policy), policy.theta.vector.clone()

    def interrupted(*args: Any) -> Any:
        assert not torch.equal(policy.theta.vector, theta)  # at a candidate
        raise KeyboardInterrupt

    monkeypatch.setattr(policy, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        step(policy, batch)
    assert torch.equal(policy.theta.vector, theta)
