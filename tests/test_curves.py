"""Curves are read whole, told apart, and grouped over seeds by the right statistics."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from made_runs import RETURN, make_curve, make_run
from scipy import stats

from trpo.analysis.curves import aggregate, endings, find_runs, longest_per_seed, read_curve, read_curves, told_apart
from trpo.analysis.seed_statistics import bootstrap_interval, permutation_p
from trpo.errors import UserError

# Statistics


def test_bootstrap_interval_agrees_with_scipy() -> None:
    values = np.random.default_rng(3).normal(size=(12, 1))
    low, high = bootstrap_interval(values)
    oracle = stats.bootstrap((values[:, 0],), np.mean, n_resamples=20_000, method="percentile", rng=1)
    # Monte Carlo error of a 2.5 % quantile from 2000 resamples: √(0.025·0.975/2000)/φ(1.96) ≈ 0.06 standard errors of
    # the mean. Four of these still tell a 95 % interval from one of 90 % (0.32 apart) and from the spread of the
    # values (√12 times as wide).
    tolerance = 0.24 * oracle.standard_error
    assert low[0] == pytest.approx(oracle.confidence_interval.low, abs=tolerance)
    assert high[0] == pytest.approx(oracle.confidence_interval.high, abs=tolerance)


def test_bootstrap_draws_whole_seeds() -> None:
    low, high = bootstrap_interval(np.random.default_rng(0).normal(size=(6, 1)) + np.zeros((6, 50)))
    # Points that are equal in every seed have equal intervals, up to the rounding of a matrix product.
    np.testing.assert_allclose([np.ptp(low), np.ptp(high)], 0, atol=1e-12)


@pytest.mark.parametrize(("first", "second"), [(3, 4), (2, 2), (2, 5), (9, 12)])
def test_permutation_p_agrees_with_scipy(first: int, second: int) -> None:
    rng = np.random.default_rng(first)
    a, b = rng.normal(size=first), rng.normal(size=second) + 0.5

    def apart(x: np.ndarray, y: np.ndarray, axis: int) -> np.ndarray:
        return np.abs(x.mean(axis) - y.mean(axis))

    oracle = stats.permutation_test((a, b), apart, n_resamples=40_000, alternative="greater", vectorized=True, rng=1)
    # Exact where all ways are counted. Of 20,000 drawn ones against 40,000, four standard errors of a share of ½:
    # 4 · √(¼/20,000 + ¼/40,000) = 0.017.
    tolerance = 1e-12 if first < 9 else 0.017
    assert permutation_p(a, b) == pytest.approx(oracle.pvalue, abs=tolerance)


def test_permutation_p_of_many_seeds_that_are_far_apart_is_small_but_not_0() -> None:
    assert 0 < permutation_p(np.arange(12.0), np.arange(12.0) + 100) < 1e-3
    # Equal means are no difference, whatever their rounding: these differ by a unit in the last place.
    assert permutation_p(np.array([-83.7, -83.1, 93.8, -83.1]), np.array([-83.1, 93.8, -83.7, -83.1])) == 1


def test_aggregate_interpolates_runs_to_the_steps_they_share() -> None:
    first = make_curve([0, 10, 40, 100], [0, 10, 40, 100], seed=0)
    second = make_curve([20, 30, 80], [60, 90, 240], seed=1)
    band = aggregate([first, second])
    assert band is not None
    assert (band.env_steps[0], band.env_steps[-1]) == (20, 80)
    # Values are s and 3s at every step s. Rounding: a few units in the last place of 240.
    np.testing.assert_allclose(band.mean, 2 * band.env_steps, rtol=1e-12)
    np.testing.assert_allclose(band.low, band.env_steps, rtol=1e-12)
    np.testing.assert_allclose(band.high, 3 * band.env_steps, rtol=1e-12)
    assert band.interval == "min to max"


def test_aggregate_bootstraps_from_five_seeds_on() -> None:
    curves = [make_curve([0, 10], [value, value], seed=seed) for seed, value in enumerate([0.0, 1.0, 3.0, 5.0, 6.0])]
    four, band = aggregate(curves[:4]), aggregate(curves)
    assert four is not None and four.interval == "min to max"
    assert band is not None
    assert band.interval == "95% bootstrap interval"
    np.testing.assert_allclose(band.mean, 3.0, rtol=1e-12)
    assert np.all(band.low > 0.0) and np.all(band.high < 6.0), "this is the range of the values"
    assert np.all(band.low < 3.0) and np.all(band.high > 3.0)


def test_endings_are_of_the_last_value_of_each_seed() -> None:
    scores = [0.0, 1.0, 3.0, 5.0, 6.0]
    five = [make_curve([0, 1000 + seed], [-1.0, value], seed=seed) for seed, value in enumerate(scores)]
    two = [make_curve([0, 2000], [9.0, value], seed=seed, name="other") for seed, value in enumerate([-1500.0, 0.25])]
    one = make_curve([3000], [0.03125], env_id="Second-v0")
    first, second, third = endings([*five, *two, one])
    assert (first.seeds, first.env_steps, first.mean) == (5, (1000, 1004), 3.0)
    low, high = bootstrap_interval(np.array(scores)[:, None])
    assert (first.low, first.high) == (low[0], high[0]) and 0 < first.low < 3 < first.high < 6
    assert (second.seeds, second.low, second.high, second.mean) == (2, -1500.0, 0.25, -749.875)
    spread = f"{first.low:.4g} to {first.high:.4g}"
    assert str(first) == f"Env-v0, trpo: 3 ({spread}, 95% bootstrap interval of 5 seeds, 1,000 to 1,004 steps)"
    # Of the 21 ways to choose two of the seven scores, -1500 with 0.25 or with 0 are this far from the others.
    assert second.difference == pytest.approx(-752.875, rel=1e-12) and second.p == pytest.approx(2 / 21, rel=1e-12)
    spread = "-1,500.0 to 0.25, min to max of 2 seeds, 2,000 steps"
    against = "-752.9 from the first, p = 0.095 by permutation"
    assert str(second) == f"Env-v0, other: -749.9 ({spread}); {against}"
    assert str(third) == "Second-v0, trpo: 0.03125 (1 seed, 3,000 steps)"


@pytest.mark.parametrize("curves", [[([0, 1], [0, 1])], [([0, 1], [0, 1]), ([2, 3], [0, 1])]])
def test_aggregate_has_nothing_to_say_of_one_run_or_of_runs_without_common_steps(
    curves: list[tuple[list[float], list[float]]],
) -> None:
    assert aggregate([make_curve(steps, values, seed=seed) for seed, (steps, values) in enumerate(curves)]) is None


def test_a_repeated_seed_is_not_another_sample(caplog: pytest.LogCaptureFixture) -> None:
    long = make_curve([0, 100], [1, 1])
    short = make_curve([0, 50], [2, 2])
    others = [make_curve([0, 10], [3, 3], seed=1), make_curve([0, 10], [3, 3], name="other")]
    with caplog.at_level(logging.WARNING):
        assert longest_per_seed([long, *others, short]) == [long, *others]
    assert len(caplog.records) == 1


def test_of_a_seed_that_was_run_twice_to_one_end_the_newer_run_counts(tmp_path: Path) -> None:
    """Whatever the folders are called that hold them."""
    old = make_run(tmp_path / "b" / "trpo-s0-20260101-000000", values=[1.0])
    new = make_run(tmp_path / "a" / "trpo-s0-20260102-000000", values=[2.0])
    (curve,) = read_curves([tmp_path], RETURN)
    assert curve.source.parent == new
    longer = make_run(tmp_path / "c" / "trpo-s0-20250101-000000", values=[3.0, 4.0])
    (curve,) = read_curves([tmp_path, old], RETURN)
    assert curve.source.parent == longer


def test_folders_given_apart_are_compared_where_they_share_seeds(tmp_path: Path) -> None:
    """As before and after a change of the code, which no setting shows."""
    for seed in range(2):
        for side, env_id in (("before", "CartPole-v1"), ("after", "CartPole-v1"), ("before", "Acrobot-v1")):
            make_run(tmp_path / side / env_id / f"trpo-s{seed}-{side}", seed=seed, env_id=env_id)
    sides = [tmp_path / "before", tmp_path / "after"]
    named = {(curve.env_id, curve.name, curve.seed) for curve in read_curves(sides, RETURN)}
    assert named == {
        *(("CartPole-v1", f"trpo, {side}", seed) for side in sides for seed in range(2)),
        *(("Acrobot-v1", "trpo", seed) for seed in range(2)),  # of one side only
    }
    names = [curve.name for curve in read_curves(sides, RETURN) if curve.env_id == "CartPole-v1"]
    assert names[0] == f"trpo, {sides[0]}", "the first given is what the others are held to"
    beside = make_run(tmp_path / "itself", env_id="Acrobot-v1")  # with a seed of the folder's
    alone = {(c.name, c.seed) for c in read_curves([sides[0] / "Acrobot-v1", beside], RETURN)}
    assert alone == {("trpo", 0), *((f"trpo, {sides[0] / 'Acrobot-v1'}", seed) for seed in range(2))}
    more = make_run(tmp_path / "elsewhere" / "trpo-s2", seed=2)  # another machine's seeds of the same experiment
    assert {curve.name for curve in read_curves([sides[0] / "CartPole-v1", more.parent], RETURN)} == {"trpo"}
    runs = sorted((tmp_path / "before" / "CartPole-v1").iterdir())
    assert len(read_curves([*runs, *runs], RETURN)) == 2, "runs given one by one are no folders to compare"


def test_runs_of_one_name_with_different_settings_are_no_seeds_of_one_another(tmp_path: Path) -> None:
    settings = {
        "a": "gae: {gamma: 0.97}",
        "b": "gae: {gamma: 0.97}\ndevice: cpu\nevaluation: {episodes: 3}\nenv: {id: CartPole-v1, workers: 2}",
        "c": "natural_gradient: {damping: 0.3}",
        "d": "natural_gradient: {damping: 0.3}\npolicy: {bins: null, std: {initial: 0.5}}",
    }
    curves = []
    for seed, (name, text) in enumerate(settings.items()):
        run = make_run(tmp_path / name, seed=seed)
        lines = {
            line.split(":")[0]: line for line in [*(run / "config.yaml").read_text().splitlines(), *text.split("\n")]
        }
        (run / "config.yaml").write_text("\n".join(lines.values()))
        curves.append(read_curve(run, RETURN))
    other = make_curve([0, 1], [0, 1], name="other")  # the only one of its name: nothing to tell it from
    named = [curve.name for curve in told_apart([*curves, other])]
    low, damped = "gae.gamma 0.97", "gae.gamma 0.99 → 0.995 cosine"
    assert named == [
        f"trpo, policy.bins 11, policy.std.initial 0.4, {low}, natural_gradient.damping 1.0",
        f"trpo, policy.bins 11, policy.std.initial 0.4, {low}, natural_gradient.damping 1.0",
        f"trpo, policy.bins 11, policy.std.initial 0.4, {damped}, natural_gradient.damping 0.3",
        f"trpo, policy.bins null, policy.std.initial 0.5, {damped}, natural_gradient.damping 0.3",
        "other",
    ]
    assert [curve.name for curve in told_apart(curves[:2])] == ["trpo", "trpo"]


# Reading runs


def test_a_mapping_of_the_users_is_no_schedule_for_having_a_shape(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    body = "policy: {body: {name: 'm:f', kwargs: {shape: [1, 3]}}}\n"
    (run / "config.yaml").write_text((run / "config.yaml").read_text() + body)
    assert read_curve(run, RETURN).settings["policy.body.kwargs.shape"] == "[1, 3]"


def test_find_runs_at_and_below_directories_each_once(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "runs" / "Env" / f"trpo-s{seed}", seed=seed) for seed in range(2)]
    make_run(tmp_path / "unknown").joinpath("config.yaml").unlink()  # nothing says what this is a run of
    (runs[0] / "final").mkdir()
    (runs[0] / "final" / "config.yaml").write_text("")  # a saved policy is not a run
    assert find_runs([runs[1], tmp_path]) == {runs[0]: str(tmp_path), runs[1]: ""}


def test_missing_runs_are_named(tmp_path: Path) -> None:
    make_run(tmp_path / "CartPole-v1")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no such run: .*did you mean .*CartPole-v1\?"):
        find_runs([tmp_path / "Cartpole-v1"])
    with pytest.raises(UserError, match=r"config.yaml is not a directory; give the run's directory"):
        find_runs([tmp_path / "CartPole-v1" / "config.yaml"])
    with pytest.raises(UserError, match=r"no run in .*empty"):
        find_runs([tmp_path / "empty"])


def test_read_curve_leaves_out_empty_and_non_finite_values(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", seed=4, name="x", values=[None, 2.0, float("nan"), float("inf"), -5.0])
    curve = read_curve(run, RETURN)
    assert (curve.env_id, curve.name, curve.seed) == ("CartPole-v1", "x", 4)
    assert curve.env_steps.tolist() == [2000.0, 5000.0] and curve.values.tolist() == [2.0, -5.0]


def test_read_curve_finds_evaluations(tmp_path: Path) -> None:
    curve = read_curve(make_run(tmp_path / "run", seed=4), "eval/mean_reward")
    assert curve.env_steps.tolist() == [3000.0] and curve.values.tolist() == [14.0]


@pytest.mark.parametrize(
    ("metric", "hint"),
    [("rollout/ep_reward_mean", "did you mean rollout/ep_rew_mean"), ("zzz", "there are rollout/ep_len_mean, rollout")],
)
def test_unknown_column_is_answered_with_those_there_are(tmp_path: Path, metric: str, hint: str) -> None:
    with pytest.raises(UserError, match=f"no column {metric} in .*{hint}"):
        read_curve(make_run(tmp_path / "run"), metric)
