"""Curves of metrics, read from the directories of runs, and what they say over seeds."""

from __future__ import annotations

import difflib
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from trpo.analysis.seed_statistics import Array, bootstrap_interval, permutation_p
from trpo.config.file import load_config
from trpo.errors import UserError, did_you_mean, nearest_path
from trpo.run.metric_files import read_table
from trpo.run.metrics import PROGRESS_FILE, TABLES

CONFIG_FILE = "config.yaml"

# Settings by which runs are not another experiment: what they are called, where they ran, how they were watched.
INCIDENTAL = {
    *("name", "seed", "device", "threads", "evaluation", "checkpoint"),
    *("env.workers", "env.timeout_s", "env.on_worker_failure", "env.max_restarts"),
}

GRID_POINTS = 200
MIN_SEEDS_FOR_BOOTSTRAP = 5  # of four it holds the mean four times in five, and of three it is their range

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
    folder: str = ""  # it was found below


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
    difference: float | None = None  # of the mean from that of the first name in its environment
    p: float | None = None  # of that difference, by permutation

    def __str__(self) -> str:
        least, most = (f"{steps:,}" for steps in self.env_steps)
        steps = f"{least} steps" if least == most else f"{least} to {most} steps"
        if self.seeds == 1:
            spread = f"1 seed, {steps}"
        else:
            spread = f"{_short(self.low)} to {_short(self.high)}, {self.interval} of {self.seeds} seeds, {steps}"
        line = f"{self.env_id}, {self.name}: {_short(self.mean)} ({spread})"
        if self.difference is None or self.p is None:
            return line
        sign = "+" if self.difference > 0 else ""
        return f"{line}; {sign}{_short(self.difference)} from the first, p = {self.p:.2g} by permutation"


def read_curves(directories: Sequence[Path], metric: str) -> list[Curve]:
    """One metric of all runs at or below some directories: a curve for each name and seed, if it has values.

    Names tell runs apart (`told_apart`), and of a seed that was repeated the longest run counts (`longest_per_seed`).
    A run that cannot be read is left out, with a warning.

    Raises:
        UserError: there is no run, none that can be read or has such a column, or nothing was measured.
    """
    curves, problems = [], []
    for run, folder in find_runs(directories).items():
        try:
            curves.append(replace(read_curve(run, metric), folder=folder))
        except UserError as error:
            problems.append(error)
    if not curves:
        raise problems[0]
    for problem in problems:
        logger.warning("left out a run: %s", problem)
    measured = [curve for curve in curves if curve.values.size]
    if not measured:
        other = "; --metric eval/mean_reward draws the evaluations" if metric.startswith("rollout/") else ""
        raise UserError(f"nothing to plot: {metric} has no value in {curves[0].source}{other}")
    return longest_per_seed(told_apart(measured))


def find_runs(directories: Sequence[Path]) -> dict[Path, str]:
    """Run directories (those with `config.yaml` and `progress.csv`) at or below the given ones, each once.

    In the order of the given ones, and each with that it was first found below, as text; empty for one given itself.

    Raises:
        UserError: a directory does not exist or holds no run.
    """
    runs: dict[Path, tuple[Path, str]] = {}
    for directory in directories:
        if not directory.is_dir():
            meant = "; give the run's directory" if directory.is_file() else _meant(directory)
            raise UserError(f"no such run: {directory} is not a directory{meant}")
        itself = (directory / PROGRESS_FILE).is_file()
        found = [directory] if itself else [path.parent for path in directory.rglob(PROGRESS_FILE)]
        found = [run for run in found if (run / CONFIG_FILE).is_file()]
        if not found:
            raise UserError(f"no run in {directory}: a run's directory holds {CONFIG_FILE} and {PROGRESS_FILE}")
        for run in sorted(found):
            runs.setdefault(run.resolve(), (run, "" if itself else str(directory)))
    return dict(runs.values())


def read_curve(run: Path, metric: str) -> Curve:
    """One metric of one run; points that are empty or not finite are left out.

    Raises:
        UserError: a file is missing or damaged, or no table has such a column.
    """
    config = load_config(run / CONFIG_FILE)
    columns: list[str] = []
    for path in (run / name for name in TABLES):
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
        elif value.keys() == {"start", "end", "shape"}:
            yield key, "{start} → {end} {shape}".format(**value)
        else:
            yield from _settings(value, f"{key}.")


def told_apart(curves: Sequence[Curve]) -> list[Curve]:
    """The curves, in their order, with what tells them apart behind their names.

    Where one name has several settings in an environment, each is followed by its own. Where it then still has a seed
    twice, in folders that were given one by one, it is followed by the folder: settings do not show what changed in
    the code.
    """
    named = []
    for curve in curves:
        peers = [other.settings for other in curves if (other.env_id, other.name) == (curve.env_id, curve.name)]
        own = [f"{key} {value}" for key, value in curve.settings.items() if any(value != p.get(key) for p in peers)]
        named.append(replace(curve, name=", ".join([curve.name, *own])))
    first_folder: dict[tuple[str, str, int], str] = {}
    repeated = {
        (c.env_id, c.name) for c in named if first_folder.setdefault((c.env_id, c.name, c.seed), c.folder) != c.folder
    }
    return [
        replace(c, name=f"{c.name}, {c.folder}") if c.folder and (c.env_id, c.name) in repeated else c for c in named
    ]


def longest_per_seed(curves: Sequence[Curve]) -> list[Curve]:
    """Of curves with the same environment, name and seed the one that goes furthest, of equals the newest: a repeated
    seed is not another sample."""
    kept: dict[tuple[str, str, int], Curve] = {}
    for curve in sorted(curves, key=lambda curve: curve.source.parent.name):  # which ends with when it began
        key = (curve.env_id, curve.name, curve.seed)
        if (other := kept.get(key)) is not None:
            curve, other = (curve, other) if curve.env_steps[-1] >= other.env_steps[-1] else (other, curve)
            logger.warning("left out %s: %s has the same seed and is longer or newer", other.source, curve.source)
        kept[key] = curve
    return [curve for curve in curves if kept[curve.env_id, curve.name, curve.seed] is curve]


def aggregate(curves: Sequence[Curve]) -> Band | None:
    """Mean and interval over at least two curves, each interpolated linearly to a common grid of steps.

    The interval is the 95 % bootstrap interval of the mean from five seeds on, below that the range of the values.
    None for a single curve, and for curves that share no stretch of steps.
    """
    first, last = max(c.env_steps[0] for c in curves), min(c.env_steps[-1] for c in curves)
    if len(curves) < 2 or first >= last:
        return None
    grid = np.linspace(first, last, GRID_POINTS)
    values = np.stack([np.interp(grid, curve.env_steps, curve.values) for curve in curves])
    return Band(grid, values.mean(axis=0), *_interval(values))


def endings(curves: Sequence[Curve]) -> list[Ending]:
    """Where the curves of each environment and name end, in their order, and how far from where the first do."""
    ends = []
    for env_id, panel in grouped(curves, lambda curve: curve.env_id).items():
        first: Array | None = None
        for name, members in grouped(panel, lambda curve: curve.name).items():
            last, steps = np.array([curve.values[-1] for curve in members]), [int(c.env_steps[-1]) for c in members]
            low, high, interval = _interval(last[:, None])
            spread = float(low[0]), float(high[0]), interval
            end = Ending(env_id, name, len(members), (min(steps), max(steps)), float(last.mean()), *spread)
            if first is None:
                first = last
            elif min(len(first), len(last)) > 1:
                end = replace(end, difference=float(last.mean() - first.mean()), p=permutation_p(first, last))
            ends.append(end)
    return ends


def grouped(curves: Iterable[Curve], key: Callable[[Curve], str]) -> dict[str, list[Curve]]:
    """The curves by a key, in the order of its first curve each."""
    groups: dict[str, list[Curve]] = {}
    for curve in curves:
        groups.setdefault(key(curve), []).append(curve)
    return groups


def _interval(values: Array) -> tuple[Array, Array, str]:
    """Of the mean over seeds of values [S, G]: low [G], high [G] and what they are."""
    if len(values) < MIN_SEEDS_FOR_BOOTSTRAP:
        return values.min(axis=0), values.max(axis=0), "min to max"
    return *bootstrap_interval(values), "95% bootstrap interval"


def _short(value: float) -> str:
    return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.4g}"


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
