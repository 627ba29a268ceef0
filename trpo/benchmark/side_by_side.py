"""Our learning results beside another implementation's: return at the same steps, and after the same time.

Returns come from learning results, time from the speed benchmark, which trains all on one machine in turn: each with
its own recipe, ours as in `OUR_ROW`, which is what the defaults are on two cores, the other with the threads that suit
it best.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trpo.benchmark.learning_results import load_results
from trpo.benchmark.markdown import number
from trpo.benchmark.speed import OURS
from trpo.benchmark.speed_report import Rows, best, median, median_ratio
from trpo.errors import UserError

OUR_ROW = f"{OURS}, mujoco × 16, 2 workers, 2 threads"


def side_by_side(ours: Path, theirs: Path, *, agent: str, speed: Path) -> str:
    """The table of all tasks that both directories of results hold, as Markdown.

    Args:
        ours, theirs: directories of learning results.
        agent: whose the others are.
        speed: `speed.json`; a task whose speed is not in it has dashes for what takes time.

    Raises:
        UserError: no task in common, no speed of any, or `speed` is another file.
    """
    both = [load_results(path) for path in (ours, theirs)]
    tasks = [task for task in both[0] if task in both[1]]
    if not tasks:
        raise UserError(f"{ours} and {theirs} hold no task in common; train one with both")
    lines = [
        f"| Environment | Ours, last policy | Seeds | Time | {agent}, last policy | Seeds | Time "
        f"| {agent} after our time | Time, theirs / ours |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    try:
        tables = json.loads(speed.read_text())["tables"] if speed.is_file() else {}
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{speed} is not what benchmark.py speed writes: give its speed.json to --speed") from error
    rates = [_Rates.of(tables.get(f"recipe {both[0][task][0]['environment']}", {}), agent) for task in tasks]
    if all(math.isnan(rate.ratio) for rate in rates):
        raise UserError(
            f"{speed} has no rates of training, ours with MuJoCo's batch and {agent}'s: with that installed, python "
            "scripts/benchmark.py speed --parts recipes --out runs/speed, then --speed runs/speed/speed.json"
        )
    for task, rate in zip(tasks, rates, strict=True):
        mine, other = (results[task] for results in both)
        environment, env_steps = mine[0]["environment"], mine[0]["env_steps"]
        then = rate.theirs * env_steps / rate.ours
        early = _mean_and_std([_return_at(run, then) for run in other])
        if any(run["evaluations"]["env_steps"][0] > then for run in other):
            early += ", its first evaluation, later"
        lines.append(
            f"| {environment} | {_scores(mine)} | {len(mine)} | {_seconds(env_steps / rate.ours)} | {_scores(other)} "
            f"| {len(other)} | {_seconds(other[0]['env_steps'] / rate.theirs)} | {early} "
            f"| {number(rate.ratio, 1)} |"
        )
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class _Rates:
    """Steps per second of training with each one's own recipe, medians; NaN where nothing was measured."""

    ours: float
    theirs: float
    ratio: float  # within rounds

    @classmethod
    def of(cls, rows: Rows, agent: str) -> _Rates:
        ours, theirs = rows.get(OUR_ROW), rows.get(best(rows, agent) or "")
        key = "steps_per_s"
        return cls(median(ours, key), median(theirs, key), median_ratio(ours, theirs, key))


def _return_at(run: dict[str, Any], env_steps: float) -> float:
    """Of a run's last evaluation until then, a few episodes, or its first if there is none; NaN for NaN."""
    if math.isnan(env_steps):
        return math.nan
    within = int(np.searchsorted(run["evaluations"]["env_steps"], env_steps, side="right"))
    return float(run["evaluations"]["mean"][max(within - 1, 0)])


def _seconds(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.0f} s"


def _scores(runs: list[dict[str, Any]]) -> str:
    return _mean_and_std([float(np.mean(run["returns"])) for run in runs])


def _mean_and_std(scores: list[float]) -> str:
    return "–" if np.isnan(scores).any() else f"{np.mean(scores):.1f} ± {np.std(scores):.1f}"
