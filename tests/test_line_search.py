"""What the line search accepts, refuses and says about it, with evaluations written down as tables."""

from __future__ import annotations

import math

import pytest

from trpo.natural_gradient import LineSearchResult, Rejection, backtracking_line_search


class Table:
    """α ↦ (gain, KL) from a list in order of the calls; remembers the α it was asked for."""

    def __init__(self, *rows: tuple[float, float]):
        self.rows = list(rows)
        self.scales: list[float] = []

    def __call__(self, scale: float) -> tuple[float, float]:
        self.scales.append(scale)
        return self.rows[len(self.scales) - 1]


def search(table: Table, **options: float) -> LineSearchResult:
    return backtracking_line_search(
        table, **({"max_kl": 0.01, "expected_gain": 1.0, "backtracks": len(table.rows) - 1, "shrink": 0.5} | options)
    )


def test_a_good_full_step_is_taken_at_once() -> None:
    table = Table((0.7, 0.009), (9.0, 0.0))
    assert search(table) == LineSearchResult(scale=1.0, gain=0.7, kl=0.009, tries=1, rejections=())
    assert table.scales == [1.0] and search(Table((0.7, 0.009))).accepted


def test_the_first_good_candidate_wins_and_refusals_are_named_in_order() -> None:
    table = Table((0.5, 0.02), (math.nan, 0.001), (-0.1, 0.001), (0.2, 0.005), (9.0, 0.0))
    result = search(table)
    assert table.scales == [1.0, 0.5, 0.25, 0.125]
    assert (result.scale, result.gain, result.kl, result.tries) == (0.125, 0.2, 0.005, 4)
    assert result.rejections == (Rejection.KL, Rejection.NONFINITE, Rejection.IMPROVEMENT)


def test_candidates_are_powers_of_the_shrink_factor() -> None:
    table = Table(*[(0.5, 1.0)] * 4)
    search(table, shrink=0.8)
    assert table.scales == pytest.approx([1.0, 0.8, 0.64, 0.512], rel=1e-15)


@pytest.mark.parametrize(("kl", "accepted"), [(0.01, True), (math.nextafter(0.01, 1), False), (0.0, True)])
def test_the_kl_bound_has_no_slack(kl: float, accepted: bool) -> None:
    assert search(Table((0.5, kl))).accepted is accepted


@pytest.mark.parametrize(("gain", "accepted"), [(1e-300, True), (0.0, False), (-1e-300, False)])
def test_without_an_accept_ratio_any_improvement_will_do(gain: float, accepted: bool) -> None:
    assert search(Table((gain, 0.0))).accepted is accepted


def test_the_expected_gain_shrinks_with_the_step_and_does_not_compound() -> None:
    # Shares of the prediction α · 1.0 at the four tries: 0.49, 0.49, 0.49, 0.51. A prediction multiplied by α anew at
    # each try (1, 1/2, 1/8, 1/64) would accept the third.
    table = Table(*[(share * 0.5**k, 0.001) for k, share in enumerate((0.49, 0.49, 0.49, 0.51))])
    result = search(table, accept_ratio=0.5)
    assert (result.scale, result.tries) == (0.125, 4)
    assert result.rejections == (Rejection.IMPROVEMENT,) * 3


def test_the_accept_ratio_is_a_share_of_the_prediction() -> None:
    assert search(Table((0.5, 0.0)), accept_ratio=0.5).accepted
    assert not search(Table((0.499, 0.0)), accept_ratio=0.5).accepted
    assert not search(Table((0.5, 0.0)), accept_ratio=0.5, expected_gain=1.01).accepted


@pytest.mark.parametrize("row", [(math.nan, 0.0), (math.inf, 0.0), (0.5, math.nan), (0.5, math.inf), (0.5, -math.inf)])
def test_what_is_not_finite_is_refused_as_such(row: tuple[float, float]) -> None:
    result = search(Table(row))
    assert not result.accepted and result.rejections == (Rejection.NONFINITE,)


def test_an_exhausted_search_accepts_nothing_and_reports_zeros() -> None:
    table = Table(*[(0.5, 0.02)] * 3)
    assert search(table) == LineSearchResult(scale=0.0, gain=0.0, kl=0.0, tries=3, rejections=(Rejection.KL,) * 3)
    assert not search(table := Table((0.5, 0.02))).accepted and table.scales == [1.0]
