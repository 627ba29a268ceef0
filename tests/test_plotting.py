"""Curves are grouped over seeds by the right statistics, and what cannot be drawn is named in one line."""

from __future__ import annotations

import errno
import logging
import runpy
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from scipy import stats

from trpo import plotting
from trpo.errors import UserError
from trpo.metrics import MetricsWriter
from trpo.plotting import (
    Curve,
    aggregate,
    draw,
    endings,
    find_runs,
    longest_per_seed,
    plot_runs,
    read_curve,
    told_apart,
)
from trpo.seed_statistics import bootstrap_interval

ROOT = Path(__file__).resolve().parent.parent
RETURN = "rollout/ep_rew_mean"


def make_curve(
    steps: Sequence[float], values: Sequence[float], *, seed: int = 0, name: str = "trpo", env_id: str = "Env-v0"
) -> Curve:
    return Curve(env_id, name, seed, np.array(steps, float), np.array(values, float), Path(f"{name}-s{seed}"))


def make_run(
    directory: Path,
    *,
    seed: int = 0,
    name: str = "trpo",
    env_id: str = "CartPole-v1",
    values: Sequence[float | None] = (1.0, 2.0, 3.0),
) -> Path:
    """A run's directory as training leaves it, with one row for every 1000 steps."""
    with MetricsWriter(directory, total_steps=10_000, console=False) as writer:
        for index, value in enumerate(values):
            writer.write({"rollout/ep_len_mean": 9.0, RETURN: value}, env_steps=1000 * (index + 1))
        writer.write_evaluation({"eval/mean_reward": 10.0 + seed}, env_steps=3000)
    (directory / "config.yaml").write_text(f"env: {{id: {env_id}}}\nname: {name}\nseed: {seed}\n")
    return directory


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


def test_aggregate_bootstraps_from_three_seeds_on() -> None:
    band = aggregate(
        [make_curve([0, 10], [value, value], seed=seed) for seed, value in enumerate([0.0, 1.0, 5.0, 6.0])]
    )
    assert band is not None
    assert band.interval == "95% bootstrap interval"
    np.testing.assert_allclose(band.mean, 3.0, rtol=1e-12)
    assert np.all(band.low > 0.0) and np.all(band.high < 6.0), "this is the range of the values"
    assert np.all(band.low < 3.0) and np.all(band.high > 3.0)


def test_endings_are_of_the_last_value_of_each_seed() -> None:
    four = [make_curve([0, 1000 + seed], [-1.0, value], seed=seed) for seed, value in enumerate([0.0, 1.0, 5.0, 6.0])]
    two = [make_curve([0, 2000], [9.0, value], seed=seed, name="other") for seed, value in enumerate([-1500.0, 0.25])]
    one = make_curve([3000], [0.03125], env_id="Second-v0")
    first, second, third = endings([*four, *two, one])
    assert (first.seeds, first.env_steps, first.mean) == (4, (1000, 1003), 3.0)
    low, high = bootstrap_interval(np.array([[0.0], [1.0], [5.0], [6.0]]))
    assert (first.low, first.high) == (low[0], high[0]) and 0 < first.low < 3 < first.high < 6
    assert (second.seeds, second.low, second.high, second.mean) == (2, -1500.0, 0.25, -749.875)
    spread = f"{first.low:.4g} to {first.high:.4g}"
    assert str(first) == f"Env-v0, trpo: 3 ({spread}, 95% bootstrap interval of 4 seeds, 1,000 to 1,003 steps)"
    assert str(second) == "Env-v0, other: -749.9 (-1,500.0 to 0.25, min to max of 2 seeds, 2,000 steps)"
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


def test_runs_with_different_settings_are_drawn_apart_and_leave_the_axes_their_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path / "defaults")
    config = make_run(tmp_path / "others", seed=1) / "config.yaml"
    others = "gae: {gamma: 0.9, lambda: 0.95}\nnormalize: {observations: false, rewards: false}\n"
    config.write_text(config.read_text() + others + "policy: {hidden_sizes: [32, 32], noise_exponent: 0.0}\n")
    drawn = []
    monkeypatch.setattr(plotting, "draw", lambda *args: drawn.append(draw(*args)) or drawn[-1])
    plot_runs([tmp_path], tmp_path / "curves.png")
    (axes,) = drawn[0].axes
    labels = legend_texts(axes)
    assert len(labels) == 2 and all("1 seed" in label for label in labels)
    assert max(len(line) for label in labels for line in label.splitlines()) <= plotting.LABEL_WIDTH
    assert axes.get_position().width > 0.6 and axes.get_position().height > 0.4  # of the figure


# Reading runs


def test_find_runs_at_and_below_directories_each_once(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "runs" / "Env" / f"trpo-s{seed}", seed=seed) for seed in range(2)]
    make_run(tmp_path / "unknown").joinpath("config.yaml").unlink()  # nothing says what this is a run of
    (runs[0] / "final").mkdir()
    (runs[0] / "final" / "config.yaml").write_text("")  # a saved policy is not a run
    assert find_runs([runs[1], tmp_path]) == runs


def test_missing_runs_are_named(tmp_path: Path) -> None:
    make_run(tmp_path / "CartPole-v1")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no such run: .*did you mean .*CartPole-v1\?"):
        find_runs([tmp_path / "Cartpole-v1"])
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


# Figures


def legend_texts(axes: Axes) -> list[str]:
    legend = axes.get_legend()
    return [text.get_text() for text in legend.get_texts()] if legend else []


def test_figure_has_a_panel_per_environment_and_says_what_the_shade_is() -> None:
    curves = [make_curve([0, 10], [seed, seed + 1], seed=seed, name="five") for seed in range(5)]
    curves += [make_curve([0, 10], [seed, seed + 1], seed=seed, name="two") for seed in range(2)]
    curves += [make_curve([0, 10], [1, 2], env_id="Other-v0", name="one")]
    figure = draw(curves, RETURN)
    env, other = figure.axes
    assert [axes.get_title() for axes in figure.axes] == ["Env-v0", "Other-v0"]
    assert (env.get_xlabel(), env.get_ylabel()) == ("environment steps", "mean return, training")
    assert legend_texts(env) == [
        "five: mean of 5 seeds, 95% bootstrap interval",
        "two: mean of 2 seeds, min to max",
    ]
    assert legend_texts(other) == ["one: 1 seed"]
    assert (len(env.collections), len(other.collections)) == (2, 0)
    thin = [line for line in env.lines if line.get_linewidth() < 1]
    assert len(thin) == 7


def test_plot_runs_writes_an_image_at_readme_width(tmp_path: Path) -> None:
    for seed in range(3):
        make_run(tmp_path / f"trpo-s{seed}", seed=seed, values=[seed, seed + 1.0])
    output = tmp_path / "curves.png"
    plot_runs([tmp_path], output)
    header = output.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", header[16:24]) == (1200, 675)


def test_a_run_without_values_is_left_out_unless_it_is_the_only_one(tmp_path: Path) -> None:
    empty = make_run(tmp_path / "empty", values=[None, None])
    full = make_run(tmp_path / "full", seed=1)
    plot_runs([empty, full], tmp_path / "curves.svg")
    assert (tmp_path / "curves.svg").read_text().startswith("<?xml")
    with pytest.raises(UserError, match=r"rollout/ep_rew_mean has no value in .*empty.*--metric eval/mean_reward"):
        plot_runs([empty], tmp_path / "curves.svg")


def test_a_run_that_cannot_be_read_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    damaged, whole = make_run(tmp_path / "damaged"), make_run(tmp_path / "whole", seed=1)
    (damaged / "config.yaml").write_text("env: {")
    plot_runs([damaged, whole], tmp_path / "curves.svg")
    assert "left out a run" in caplog.text and "damaged" in caplog.text
    with pytest.raises(UserError, match="damaged"):
        plot_runs([damaged], tmp_path / "other.svg")


@pytest.mark.parametrize("name", ["curves.xyz", "run", "run/config.yaml/curves.png"])
def test_an_image_that_cannot_be_written_is_one_clear_error(tmp_path: Path, name: str) -> None:
    run = make_run(tmp_path / "run")
    with pytest.raises(UserError, match=f"cannot write .*{name}"):
        plot_runs([run], tmp_path / name)
    assert [*tmp_path.iterdir()] == [run]


def test_an_image_stays_until_the_next_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, image = make_run(tmp_path / "run"), tmp_path / "new folder" / "curves"
    plot_runs([run], image)
    before = image.read_bytes()
    assert before.startswith(b"\x89PNG")

    def full_disk(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(UserError, match=r"cannot write .*curves: .*No space left"):
        plot_runs([run], image)
    assert image.read_bytes() == before and [*image.parent.iterdir()] == [image]


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r"pip install 'trpo\[plot\]'"):
        plot_runs([make_run(tmp_path / "run")], tmp_path / "curves.png")


# The command


def run_script(arguments: Sequence[str | Path], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["plot.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "scripts" / "plot.py"), run_name="__main__")
    assert isinstance(stop.value.code, int)
    return stop.value.code


def test_command_draws_the_metric_it_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run")
    output = tmp_path / "evaluation.svg"
    assert run_script([run, "--out", output, "--metric", "eval/mean_reward"], monkeypatch) == 0
    assert "mean return, evaluation" in output.read_text()  # matplotlib keeps the text as a comment beside its glyphs
    assert capsys.readouterr().out.splitlines() == [
        str(output),
        "eval/mean_reward, the last of each seed, on average:",
        "  CartPole-v1, trpo: 10 (1 seed, 3,000 steps)",
    ]


@pytest.mark.parametrize(
    "arguments", [[], ["missing"], ["run", "--metric", "rollout/ep_rew"], ["run", "--out"], ["run", "--colour", "red"]]
)
def test_command_ends_with_one_line_and_status_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    make_run(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    assert run_script(arguments, monkeypatch) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert not (tmp_path / "curves.png").exists()


def test_command_works_from_a_checkout(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    command = [sys.executable, str(ROOT / "scripts" / "plot.py"), str(run), "--out", str(tmp_path / "curves.png")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stderr) == (0, "")
    assert (tmp_path / "curves.png").stat().st_size > 1000
