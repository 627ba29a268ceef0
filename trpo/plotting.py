"""Learning curves of runs, grouped over seeds."""

from __future__ import annotations

import difflib
import io
import json
import logging
import math
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trpo.config_file import load_config
from trpo.errors import UserError, did_you_mean, nearest_path
from trpo.metric_files import read_table
from trpo.metrics import EVALUATIONS_FILE, PROGRESS_FILE
from trpo.seed_statistics import Array, bootstrap_interval
from trpo.whole_file import whole_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CONFIG_FILE = "config.yaml"
DEFAULT_METRIC = "rollout/ep_rew_mean"
AXIS_LABELS = {
    "rollout/ep_rew_mean": "mean return, training",
    "rollout/ep_len_mean": "mean episode length, training",
    "rollout/success_rate": "success rate, training",
    "eval/mean_reward": "mean return, evaluation",
    "eval/mean_ep_length": "mean episode length, evaluation",
    "eval/success_rate": "success rate, evaluation",
}

# Settings by which runs are not another experiment: what they are called, where they ran, how they were watched.
INCIDENTAL = {
    *("name", "seed", "device", "threads", "evaluation", "checkpoint"),
    *("env.workers", "env.timeout_s", "env.on_worker_failure", "env.max_restarts"),
}

GRID_POINTS = 200
LABEL_WIDTH, LABEL_CHARACTERS = 60, 200
MIN_SEEDS_FOR_BOOTSTRAP = 3  # of two values there are three resamples: no interval worth the name

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Curve:
    """One metric of one run."""

    env_id: str
    name: str
    seed: int
    env_steps: Array  # [K] increasing
    values: Array  # [K] finite
    source: Path
    settings: Mapping[str, str] = field(default_factory=dict)  # what it learned with, as text


@dataclass(frozen=True, slots=True)
class Band:
    """Mean over seeds with an interval, on the steps that all of them cover."""

    env_steps: Array  # [G]
    mean: Array  # [G]
    low: Array  # [G]
    high: Array  # [G]
    interval: str  # what low and high are


@dataclass(frozen=True, slots=True)
class Ending:
    """The last value of each seed's curve: the mean, with an interval if there are several."""

    env_id: str
    name: str
    seeds: int
    env_steps: tuple[int, int]  # the least and the most, of the last values
    mean: float
    low: float  # with high: of `interval`
    high: float
    interval: str

    def __str__(self) -> str:
        least, most = (f"{steps:,}" for steps in self.env_steps)
        steps = f"{least} steps" if least == most else f"{least} to {most} steps"
        if self.seeds == 1:
            spread = f"1 seed, {steps}"
        else:
            spread = f"{_short(self.low)} to {_short(self.high)}, {self.interval} of {self.seeds} seeds, {steps}"
        return f"{self.env_id}, {self.name}: {_short(self.mean)} ({spread})"


def plot_runs(directories: Sequence[Path], output: Path, *, metric: str = DEFAULT_METRIC) -> list[Ending]:
    """Draws a metric against environment steps: one panel per environment, one colour per name, a mean over seeds.

    The metric is looked for in `progress.csv`, then in `evaluations.csv`. Runs of one name that learned with different
    settings get a colour for each, labelled with what differs. Where several runs share environment, name, settings
    and seed, the longest counts: a repeated seed is not another sample.

    Args:
        directories: run directories, or directories that hold some at any depth.
        output: image to write, folders and all; its suffix (.png, .svg, .pdf) decides the format, by default png.
        metric: a column of the tables, such as `eval/mean_reward`.

    Returns:
        Where the curves end, for each colour of each panel.

    A run that cannot be read is left out, with a warning.

    Raises:
        UserError: there is no run, none that can be read or has such a column, nothing measured, no matplotlib, or
            `output` cannot be written.
    """
    curves = _read_curves(find_runs(directories), metric)
    measured = [curve for curve in curves if curve.values.size]
    if not measured:
        other = "; --metric eval/mean_reward draws the evaluations" if metric.startswith("rollout/") else ""
        raise UserError(f"nothing to plot: {metric} has no value in {curves[0].source}{other}")
    drawn = longest_per_seed(told_apart(measured))
    figure = draw(drawn, metric)
    image = io.BytesIO()
    try:
        figure.savefig(image, format=output.suffix.removeprefix(".") or "png")
        target = output.resolve()  # where a link leads
        if target.exists() and not target.is_file():  # a pipe, say, or a folder, which refuses
            target.write_bytes(image.getvalue())
        else:
            with whole_file(target) as file:
                file.write_bytes(image.getvalue())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {output}: {error}") from error
    return endings(drawn)


def find_runs(directories: Sequence[Path]) -> list[Path]:
    """Run directories (those with `config.yaml` and `progress.csv`) at or below the given ones, sorted, each once.

    Raises:
        UserError: a directory does not exist or holds no run.
    """
    runs: dict[Path, Path] = {}
    for directory in directories:
        if not directory.is_dir():
            raise UserError(f"no such run: {directory} is not a directory{_meant(directory)}")
        here = [directory] if (directory / PROGRESS_FILE).is_file() else []
        found = here or [path.parent for path in directory.rglob(PROGRESS_FILE)]
        found = [run for run in found if (run / CONFIG_FILE).is_file()]
        if not found:
            raise UserError(f"no run in {directory}: a run's directory holds {CONFIG_FILE} and {PROGRESS_FILE}")
        runs.update({run.resolve(): run for run in found})
    return sorted(runs.values())


def _read_curves(runs: Sequence[Path], metric: str) -> list[Curve]:
    curves, problems = [], []
    for run in runs:
        try:
            curves.append(read_curve(run, metric))
        except UserError as error:
            problems.append(error)
    if not curves:
        raise problems[0]
    for problem in problems:
        logger.warning("left out a run: %s", problem)
    return curves


def read_curve(run: Path, metric: str) -> Curve:
    """One metric of one run; points that are empty or not finite are left out.

    Raises:
        UserError: a file is missing or damaged, or neither table has such a column.
    """
    config = load_config(run / CONFIG_FILE)
    columns: list[str] = []
    for path in (run / PROGRESS_FILE, run / EVALUATIONS_FILE):
        if not path.is_file():
            continue
        header, rows = _read(path)
        if metric in header[1:]:
            points = _points(rows, header.index(metric), path)
            settings = dict(_settings(config.model_dump(by_alias=True)))
            return Curve(config.env.id, config.name, config.seed, points[:, 0], points[:, 1], path, settings)
        columns += header[1:]
    raise UserError(f"no column {metric} in {run / PROGRESS_FILE}{_near(metric, columns)}")


def _settings(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys and values of the settings that are not incidental; a schedule is one value."""
    for name, value in section.items():
        key = prefix + name
        if key in INCIDENTAL:
            continue
        if not isinstance(value, dict) or key == "env.kwargs":
            yield key, value if isinstance(value, str) else json.dumps(value)
        elif "shape" in value:
            yield key, "{start} → {end} {shape}".format(**value)
        else:
            yield from _settings(value, f"{key}.")


def told_apart(curves: Sequence[Curve]) -> list[Curve]:
    """The curves, in their order; where one name has several settings in an environment, it is followed by its own."""
    named = []
    for curve in curves:
        peers = [other.settings for other in curves if (other.env_id, other.name) == (curve.env_id, curve.name)]
        own = [f"{key} {value}" for key, value in curve.settings.items() if any(value != p.get(key) for p in peers)]
        named.append(replace(curve, name=", ".join([curve.name, *own])))
    return named


def longest_per_seed(curves: Sequence[Curve]) -> list[Curve]:
    """Of curves with the same environment, name and seed the one that goes furthest, the last of equals."""
    kept: dict[tuple[str, str, int], Curve] = {}
    for curve in curves:
        key = (curve.env_id, curve.name, curve.seed)
        if (other := kept.get(key)) is not None:
            curve, other = (curve, other) if curve.env_steps[-1] >= other.env_steps[-1] else (other, curve)
            logger.warning("left out %s: %s has the same seed and is longer or newer", other.source, curve.source)
        kept[key] = curve
    return list(kept.values())


def aggregate(curves: Sequence[Curve]) -> Band | None:
    """Mean and interval over at least two curves, each interpolated linearly to a common grid of steps.

    The interval is the 95 % bootstrap interval of the mean from three seeds on, below that the range of the values.
    None for a single curve, and for curves that share no stretch of steps.
    """
    first, last = max(c.env_steps[0] for c in curves), min(c.env_steps[-1] for c in curves)
    if len(curves) < 2 or first >= last:
        return None
    grid = np.linspace(first, last, GRID_POINTS)
    values = np.stack([np.interp(grid, curve.env_steps, curve.values) for curve in curves])
    return Band(grid, values.mean(axis=0), *_interval(values))


def endings(curves: Sequence[Curve]) -> list[Ending]:
    """Where the curves of each environment and name end, in their order."""
    ends = []
    for env_id, panel in _grouped(curves, lambda curve: curve.env_id).items():
        for name, members in _grouped(panel, lambda curve: curve.name).items():
            last, steps = np.array([curve.values[-1] for curve in members]), [int(c.env_steps[-1]) for c in members]
            low, high, interval = _interval(last[:, None])
            spread = float(low[0]), float(high[0]), interval
            ends.append(Ending(env_id, name, len(members), (min(steps), max(steps)), float(last.mean()), *spread))
    return ends


def _interval(values: Array) -> tuple[Array, Array, str]:
    """Of the mean over seeds of values [S, G]: low [G], high [G] and what they are."""
    if len(values) < MIN_SEEDS_FOR_BOOTSTRAP:
        return values.min(axis=0), values.max(axis=0), "min to max"
    return *bootstrap_interval(values), "95% bootstrap interval"


def _short(value: float) -> str:
    return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.4g}"


def draw(curves: Sequence[Curve], metric: str) -> Figure:
    """One panel per environment, readable at the width of a README.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("plots need matplotlib: pip install 'trpo[plot]'") from error
    panels = _grouped(curves, lambda curve: curve.env_id)
    columns = min(len(panels), 3)
    rows = math.ceil(len(panels) / columns)
    # No pyplot: a figure of its own has no window, no global state, and is drawn by Agg.
    figure = Figure(figsize=(max(8.0, 4.5 * columns), 4.5 * rows), dpi=150, layout="constrained")
    for index, (env_id, members) in enumerate(panels.items()):
        axes = figure.add_subplot(rows, columns, index + 1)
        _draw_panel(figure, axes, env_id, members, AXIS_LABELS.get(metric, metric))
    return figure


def _draw_panel(figure: Figure, axes: Axes, env_id: str, curves: Sequence[Curve], measure: str) -> None:
    from matplotlib.ticker import EngFormatter
    from matplotlib.transforms import offset_copy

    for index, (name, members) in enumerate(_grouped(curves, lambda curve: curve.name).items()):
        colour = f"C{index}"
        band = aggregate(members)
        if band is None:
            said = "1 seed" if len(members) == 1 else f"{len(members)} seeds without common steps"
        else:
            said = f"mean of {len(members)} seeds, {band.interval}"
            axes.fill_between(band.env_steps, band.low, band.high, color=colour, alpha=0.2, linewidth=0)
            axes.plot(band.env_steps, band.mean, color=colour, linewidth=2.0, zorder=3)
        width, alpha = (2.0, 1.0) if len(members) == 1 else (0.7, 0.45)
        for curve in members:
            marker = "o" if curve.values.size == 1 else ""
            axes.plot(curve.env_steps, curve.values, color=colour, linewidth=width, alpha=alpha, marker=marker)
        # Many settings would leave the axes no room.
        label = textwrap.fill(f"{textwrap.shorten(name, LABEL_CHARACTERS, placeholder=' …')}: {said}", LABEL_WIDTH)
        axes.plot([], [], color=colour, linewidth=2.0, label=label)
    axes.set_title(env_id, fontsize=14)
    axes.set_xlabel("environment steps", fontsize=12)
    axes.set_ylabel(measure, fontsize=12)
    axes.tick_params(labelsize=11)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    # Never over a curve, and below the axis' own texts however little room a long legend leaves the axes.
    below = offset_copy(axes.transAxes, fig=figure, y=-36, units="points")
    axes.legend(
        fontsize=9, loc="upper center", bbox_to_anchor=(0.5, 0), bbox_transform=below, borderaxespad=0, frameon=False
    )


def _grouped(curves: Iterable[Curve], key: Callable[[Curve], str]) -> dict[str, list[Curve]]:
    groups: dict[str, list[Curve]] = {}
    for curve in curves:
        groups.setdefault(key(curve), []).append(curve)
    return groups


def _read(path: Path) -> tuple[list[str], list[list[str]]]:
    try:
        return read_table(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def _points(rows: Iterable[list[str]], column: int, path: Path) -> Array:
    """Steps and values [K, 2] of a column, without what is empty or not finite."""
    try:
        points = [(float(row[0]), float(row[column])) for row in rows if row[column]]
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from error
    return np.array([point for point in points if math.isfinite(point[1])], dtype=np.float64).reshape(-1, 2)


def _near(metric: str, columns: Sequence[str]) -> str:
    """What else there is: the nearest columns, or all of them where none is near."""
    if near := difflib.get_close_matches(metric, columns, n=3):
        return did_you_mean(near)
    return f"; there are {', '.join(columns)}" if columns else "; it holds no metric yet"


def _meant(directory: Path) -> str:
    """The nearest name beside a directory that does not exist."""
    parent = directory.parent
    return nearest_path(directory, parent.iterdir() if parent.is_dir() else ())
