"""A report of an update becomes named numbers, each under its own name."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from trpo.agent import UpdateReport
from trpo.batch import Batch
from trpo.natural_gradient import Outcome, StepReport
from trpo.natural_gradient.conjugate_gradient import CGSolution, CGStatus
from trpo.natural_gradient.line_search import LineSearchResult, Rejection
from trpo.run.diagnostics import update_metrics
from trpo.value import FitReport

CG = CGSolution(
    x=torch.zeros(1),
    residual=torch.zeros(1),
    relative_residual=0.125,
    iterations=7,
    status=CGStatus.CONVERGED,
    ritz_values=torch.tensor([0.5, 1.0, 4.0]),
)
STEP = StepReport(
    Outcome.ACCEPTED,
    max_kl=0.01,
    gradient_norm=2.5,
    step_norm=1.25,
    expected_gain=0.06,
    gain=0.05,
    quadratic_kl=0.0064,
    kl=0.006,
    scale=0.8,
    search=LineSearchResult(0.8, 0.05, 0.006, tries=2, rejections=(Rejection.KL,)),
    cg=CG,
)
REPORT = UpdateReport(
    Batch(*[torch.zeros(1)] * 3),
    STEP,
    FitReport(loss_before=3.0, loss_after=2.0, steps=160, refused=11),
    transitions=2048,
    entropy=1.5,
    normalizer_kl=0.002,
    std=0.4,
    explained_variance_before=0.7,
    explained_variance_after=0.9,
    effective_share=0.6,
    learning_rate=3e-4,
)
OF_THE_STEP = {
    "train/policy_objective": 0.05,
    "train/kl_divergence_loss": 0.006,
    "train/is_line_search_success": 1.0,
    "trust_region/max_kl": 0.01,
    "trust_region/quadratic_kl": 0.0064,
    "trust_region/kl": 0.006,
    "trust_region/expected_improvement": 0.06,
    "trust_region/actual_improvement": 0.05,
    "trust_region/step_scale": 0.8,
    "trust_region/backtracks": 1,  # of two tries
    "trust_region/gradient_norm": 2.5,
    "trust_region/step_norm": 1.25,
    "trust_region/cg_iterations": 7,
    "trust_region/cg_residual": 0.125,
    "trust_region/max_ritz_value": 4.0,
    "trust_region/condition": 8.0,
}
OF_THE_REST = {
    "train/std": 0.4,
    "train/value_loss": 2.0,
    "train/explained_variance": 0.7,
    "train/learning_rate": 3e-4,
    "value/loss_before": 3.0,
    "value/explained_variance_after": 0.9,
    "value/refused_steps": 11,
    "trust_region/normalizer_kl": 0.002,
    "trust_region/entropy": 1.5,
    "trust_region/effective_share": 0.6,
}


def test_an_update_is_written_down_number_by_number() -> None:
    assert update_metrics(REPORT) == OF_THE_STEP | OF_THE_REST


def test_while_the_policy_rests_there_are_only_the_numbers_of_the_rest() -> None:
    resting = replace(REPORT, step=StepReport(Outcome.RESTED))
    assert update_metrics(resting) == dict.fromkeys(OF_THE_STEP) | OF_THE_REST


def test_what_there_is_none_of_is_left_empty() -> None:
    found = update_metrics(replace(REPORT, std=math.nan, effective_share=None, learning_rate=None))
    assert found["train/std"] is None and found["train/learning_rate"] is None
    assert "trust_region/effective_share" not in found  # no column at all where no rollout is learned from again


@pytest.mark.parametrize("ritz_values", [[], [-1.0, 2.0]])
def test_a_step_that_was_refused_has_what_is_known_of_it(ritz_values: list[float]) -> None:
    cg = replace(CG, ritz_values=torch.tensor(ritz_values))
    found = update_metrics(replace(REPORT, step=StepReport(Outcome.NONPOSITIVE_CURVATURE, max_kl=0.01, cg=cg)))
    assert found["train/is_line_search_success"] == 0 and found["trust_region/backtracks"] is None
    assert math.isnan(found["trust_region/kl"] or 0) and math.isnan(found["trust_region/condition"] or 0)
    assert found["trust_region/max_ritz_value"] == (2.0 if ritz_values else None)
