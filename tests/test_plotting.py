"""A picture says what it shows, and what cannot be drawn is named in one line."""

from __future__ import annotations

import errno
import runpy
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from made_runs import RETURN, make_curve, make_run
from matplotlib.axes import Axes

from trpo.analysis import plotting
from trpo.analysis.plotting import draw, plot_runs
from trpo.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


# Figures


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
    with pytest.raises(UserError, match=f"cannot write .*{name}") as caught:
        plot_runs([run], tmp_path / name)
    assert "partial" not in str(caught.value)  # the file that it is written to first
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
