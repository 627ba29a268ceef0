"""Conjugate gradients against dense solves, dense spectra and scipy's implementation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from helpers import F64, randn, relative_error, spd_matrix
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trpo.natural_gradient import CGStatus, conjugate_gradient
from trpo.natural_gradient.conjugate_gradient import blind_iterations, ritz_values, solution

SIZE = 12
spectra = st.lists(st.floats(0.01, 100.0), min_size=1, max_size=SIZE).map(
    lambda values: torch.tensor(values, dtype=F64)
)


def solve(a: Tensor, b: Tensor, **options: object):
    return conjugate_gradient(lambda v: a @ v, b, **({"max_iterations": 200, "tolerance": 1e-12} | options))


@given(spectrum=spectra, seed=st.integers(0, 1000))
def test_solves_what_a_dense_solver_solves(spectrum: Tensor, seed: int) -> None:
    a, b = spd_matrix(spectrum, seed=seed), randn(len(spectrum), seed=seed + 1)
    solution = solve(a, b)
    assert solution.status is CGStatus.CONVERGED
    # ‖x − x*‖ / ‖x*‖ ≤ condition · relative residual = 1e4 · 1e-12, and as much again for rounding.
    assert relative_error(solution.x, torch.linalg.solve(a, b)) <= 2e-8
    assert relative_error(a @ solution.x, b) <= 1e-11
    assert solution.relative_residual <= 1e-12


@given(distinct=st.integers(1, 5), seed=st.integers(0, 1000))
def test_takes_one_iteration_per_distinct_eigenvalue(distinct: int, seed: int) -> None:
    spectrum = torch.linspace(1, 3, distinct, dtype=F64)[torch.arange(SIZE) % distinct]
    solution = solve(spd_matrix(spectrum, seed=seed), randn(SIZE, seed=seed + 1), tolerance=1e-10)
    assert solution.iterations <= distinct


@pytest.mark.parametrize("iterations", range(1, 9))
def test_every_iterate_is_scipys(iterations: int) -> None:
    a, b = spd_matrix(torch.logspace(-2, 2, SIZE, dtype=F64)), randn(SIZE, seed=1)
    solution = solve(a, b, max_iterations=iterations)
    expected, _ = scipy.sparse.linalg.cg(a.numpy(), b.numpy(), rtol=1e-12, maxiter=iterations)
    # The same recurrence in another order of summation: rounding grows with the condition number, 1e4 · 2.2e-16.
    np.testing.assert_allclose(solution.x.numpy(), expected, rtol=1e-9, atol=1e-9)
    assert (solution.iterations, solution.status) == (iterations, CGStatus.ITERATION_LIMIT)


@pytest.mark.parametrize(
    ("b", "scale"),
    [(randn(SIZE), 1.0), (randn(SIZE), -1.0), (torch.zeros(SIZE, dtype=F64), 1.0), (randn(SIZE), math.inf)],
)
@pytest.mark.parametrize("iterations", [3, 30])
def test_iterations_after_the_end_change_nothing(b: Tensor, scale: float, iterations: int) -> None:
    """What an accelerator does, which is not waited for, is what a host does that stops in time."""
    a, calls = scale * spd_matrix(torch.linspace(1, 3, SIZE, dtype=F64)), []

    def product(v: Tensor) -> Tensor:
        calls.append(v)
        return a @ v

    stopped = conjugate_gradient(product, b, max_iterations=iterations, tolerance=1e-9)
    blind = solution(*blind_iterations(product, b, iterations, 1e-9))
    assert torch.equal(stopped.x, blind.x) and torch.equal(stopped.residual, blind.residual)
    assert (stopped.status, stopped.iterations) == (blind.status, blind.iterations)
    assert torch.equal(stopped.ritz_values, blind.ritz_values)
    assert len(calls) <= 2 * iterations


def test_nothing_is_read_by_the_host_before_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    a, reads = spd_matrix(torch.linspace(1, 3, SIZE, dtype=F64)), []
    for name in ("item", "tolist", "__bool__", "__float__", "__int__"):
        inner = getattr(Tensor, name)
        monkeypatch.setattr(Tensor, name, lambda self, inner=inner, name=name: (reads.append(name), inner(self))[1])
    solution(*blind_iterations(lambda v: a @ v, randn(SIZE), 8, 1e-8))
    assert reads[0] == "tolist" and reads.count("tolist") == 1  # the rest is of numbers that are the host's already


def test_preconditioned_iterates_are_scipys_and_fewer() -> None:
    a, b = spd_matrix(torch.ones(SIZE, dtype=F64)) + torch.diag(torch.logspace(0, 4, SIZE, dtype=F64)), randn(SIZE)
    a += 0.1 * spd_matrix(torch.linspace(0.1, 1, SIZE, dtype=F64), seed=3)
    inverse = 1 / a.diagonal()
    preconditioner = scipy.sparse.linalg.LinearOperator((SIZE, SIZE), matvec=lambda r: inverse.numpy() * r)
    for iterations in (1, 2, 3):
        solution = solve(a, b, max_iterations=iterations, tolerance=1e-14, preconditioner=lambda r: inverse * r)
        expected, _ = scipy.sparse.linalg.cg(a.numpy(), b.numpy(), rtol=1e-14, maxiter=iterations, M=preconditioner)
        np.testing.assert_allclose(solution.x.numpy(), expected, rtol=1e-9, atol=1e-12)
    with_it = solve(a, b, tolerance=1e-10, preconditioner=lambda r: inverse * r)
    assert with_it.status is CGStatus.CONVERGED
    assert with_it.iterations < solve(a, b, tolerance=1e-10).iterations
    assert relative_error(a @ with_it.x, b) <= 1e-9


def test_an_exact_preconditioner_needs_one_iteration() -> None:
    a, b = spd_matrix(torch.logspace(-2, 2, SIZE, dtype=F64)), randn(SIZE)
    inverse = torch.linalg.inv(a)
    assert solve(a, b, tolerance=1e-8, preconditioner=lambda r: inverse @ r).iterations == 1


def test_the_residual_is_the_residual() -> None:
    a, b = spd_matrix(torch.logspace(-1, 1, SIZE, dtype=F64)), randn(SIZE)
    solution = solve(a, b, max_iterations=4)
    torch.testing.assert_close(solution.residual, b - a @ solution.x, rtol=0, atol=1e-13)
    assert solution.relative_residual == pytest.approx(float(solution.residual.norm() / b.norm()), rel=1e-12)


def test_arguments_are_left_alone() -> None:
    a, b = spd_matrix(torch.linspace(1, 9, SIZE, dtype=F64)), randn(SIZE)
    kept = b.clone()
    first = solve(a, b)
    assert torch.equal(b, kept)
    assert torch.equal(solve(a, b).x, first.x)


def test_direction_and_residual_do_not_share_memory() -> None:
    """Sharing them solves nothing from the second iteration on (peers' defect 3), nor does an identity that shares."""
    a, b = spd_matrix(torch.linspace(1, 9, SIZE, dtype=F64)), randn(SIZE)
    expected = torch.linalg.solve(a, b)
    for preconditioner in (None, lambda r: r):
        assert relative_error(solve(a, b, preconditioner=preconditioner).x, expected) <= 1e-10


def test_ritz_values_after_all_iterations_are_the_eigenvalues() -> None:
    a, b = spd_matrix(torch.tensor([0.5, 1.0, 2.0, 4.0, 8.0], dtype=F64)), randn(5)
    solution = solve(a, b, max_iterations=5, tolerance=0.0)
    # Lanczos is exact after P steps up to rounding, which 5 well-separated eigenvalues amplify little.
    np.testing.assert_allclose(solution.ritz_values.numpy(), np.linalg.eigvalsh(a.numpy()), rtol=1e-10)
    assert solution.condition == pytest.approx(16.0, rel=1e-9)


def test_ritz_values_of_few_iterations_lie_inside_the_spectrum_and_find_its_end() -> None:
    a = spd_matrix(torch.cat([torch.linspace(1, 2, 29, dtype=F64), torch.tensor([50.0], dtype=F64)]))
    ritz = solve(a, randn(30), max_iterations=4).ritz_values
    assert len(ritz) == 4 and (ritz.diff() > 0).all()
    assert ritz[0] >= 1 - 1e-10 and ritz[-1] <= 50 + 1e-10
    assert float(ritz[-1]) == pytest.approx(50, rel=1e-2)


def test_preconditioned_ritz_values_are_those_of_the_preconditioned_matrix() -> None:
    a, b = spd_matrix(torch.tensor([0.5, 1.0, 2.0, 4.0, 8.0], dtype=F64)), randn(5)
    inverse = 1 / a.diagonal()
    solution = solve(a, b, max_iterations=5, tolerance=0.0, preconditioner=lambda r: inverse * r)
    expected = np.sort(np.linalg.eigvals((inverse.unsqueeze(1) * a).numpy()).real)
    np.testing.assert_allclose(solution.ritz_values.numpy(), expected, rtol=1e-9)


def test_no_iteration_has_no_ritz_value() -> None:
    assert len(ritz_values([], [])) == 0
    assert len(ritz_values([math.inf], [])) == 1  # 1/α = 0
    assert len(ritz_values([1.0, math.nan], [0.5])) == 0


def test_a_zero_right_hand_side_is_solved_by_zero_without_a_product() -> None:
    def never(v: Tensor) -> Tensor:
        raise AssertionError("no product is needed")

    solution = conjugate_gradient(never, torch.zeros(3, dtype=F64), max_iterations=5)
    assert (solution.status, solution.iterations, solution.relative_residual) == (CGStatus.CONVERGED, 0, 0.0)
    assert (solution.x == 0).all() and math.isnan(solution.condition)


@pytest.mark.parametrize("scale", [-1.0, 0.0])
def test_non_positive_curvature_is_a_status(scale: float) -> None:
    solution = conjugate_gradient(lambda v: scale * v, randn(3), max_iterations=5)
    assert (solution.status, solution.iterations) == (CGStatus.NONPOSITIVE_CURVATURE, 0)
    assert (solution.x == 0).all()


def test_an_indefinite_matrix_ends_with_the_last_good_iterate() -> None:
    a, b = torch.diag(torch.tensor([4.0, 1.0, -2.0], dtype=F64)), torch.tensor([1.0, 1.0, 0.5], dtype=F64)
    solution = solve(a, b)
    assert solution.status is CGStatus.NONPOSITIVE_CURVATURE and solution.iterations > 0
    assert torch.equal(solution.x, solve(a, b, max_iterations=solution.iterations).x)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 2])
def test_a_non_finite_product_is_a_status_and_never_enters_x(bad: float, at: int) -> None:
    a, b, calls = spd_matrix(torch.linspace(1, 9, SIZE, dtype=F64)), randn(SIZE), []

    def product(v: Tensor) -> Tensor:
        calls.append(None)
        out = a @ v
        if len(calls) == at + 1:
            out[0] = bad
        return out

    solution = conjugate_gradient(product, b, max_iterations=9)
    assert (solution.status, solution.iterations) == (CGStatus.NONFINITE, at)
    assert torch.equal(solution.x, solve(a, b, max_iterations=at).x)


def test_a_non_finite_right_hand_side_is_a_status() -> None:
    solution = conjugate_gradient(lambda v: v, torch.tensor([1.0, math.nan]), max_iterations=5)
    assert (solution.status, solution.iterations) == (CGStatus.NONFINITE, 0)


@given(exponent=st.integers(-100, 100))
def test_the_tolerance_is_relative(exponent: int) -> None:
    """A power of two scales every intermediate exactly, so x has to scale bitwise and the count stay the same."""
    a, b, factor = spd_matrix(torch.logspace(-1, 1, SIZE, dtype=F64)), randn(SIZE), 2.0**exponent
    plain, scaled = solve(a, b, tolerance=0.1), solve(a, factor * b, tolerance=0.1)
    assert scaled.iterations == plain.iterations < SIZE
    assert scaled.relative_residual == plain.relative_residual
    assert torch.equal(scaled.x, factor * plain.x)


def test_float32_converges_to_float32_accuracy() -> None:
    a, b = spd_matrix(torch.logspace(-1, 1, SIZE, dtype=F64)), randn(SIZE)
    solution = conjugate_gradient(lambda v: a.float() @ v, b.float(), max_iterations=50, tolerance=1e-6)
    assert solution.status is CGStatus.CONVERGED
    # condition 100 · float32 rounding 1.2e-7, tenfold.
    assert relative_error(solution.x.double(), torch.linalg.solve(a, b)) <= 1e-4
