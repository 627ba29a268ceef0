"""Our learning results beside another implementation's: return at the same steps, and after the same time.

Both are of the runs themselves, which may have had company on their machine. How much faster we train on one machine,
in turn, the speed benchmark says: each with its own recipe, ours as in `OUR_ROW`, which is what the defaults are on two
cores, the other with the threads that suit it best.
"""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np

from trpo.benchmark.learning_results import load_results
from trpo.benchmark.markdown import number
from trpo.benchmark.speed_report import Rows, best, median_ratio
from trpo.benchmark.work import OURS
from trpo.errors import UserError

OUR_ROW = f"{OURS}, mujoco × 16, 2 workers, 2 threads"


def side_by_side(ours: Path, theirs: Path, *, agent: str, speed: Path) -> str:
    """The table of all tasks that both directories of results hold, as Markdown.

    Args:
        ours, theirs: directories of learning results.
        agent: whose the others are.
        speed: `speed.json`; a task whose speed is not in it has a dash for the rates.

    Raises:
        UserError: no task in common, no speed of any, or `speed` is another file.
    """
    both = [load_results(path) for path in (ours, theirs)]
    tasks = [task for task in both[0] if task in both[1]]
    if not tasks:
        raise UserError(f"{ours} and {theirs} hold no task in common; train one with both")
    lines = [
        f"| Environment | Ours, last policy | Seeds | Time of a run | {agent}, last policy | Seeds | Time of a run "
        f"| {agent} after our time | Rate in turn, ours / theirs |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    try:
        tables = json.loads(speed.read_text())["tables"] if speed.is_file() else {}
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{speed} is not what benchmark.py speed writes: give its speed.json to --speed") from error
    ratios = [_ratio(tables.get(f"recipe {both[0][task][0]['environment']}", {}), agent) for task in tasks]
    if all(math.isnan(ratio) for ratio in ratios):
        raise UserError(
            f"{speed} has no rates of training, ours with MuJoCo's batch and {agent}'s: with that installed, python "
            "scripts/benchmark.py speed --parts recipes --out runs/speed, then --speed runs/speed/speed.json"
        )
    for task, ratio in zip(tasks, ratios, strict=True):
        mine, other = (results[task] for results in both)
        our_time = _time(mine)
        early = _mean_and_std([_return_after(run, our_time) for run in other])
        if any(run["evaluations"]["env_steps"][0] > _steps_after(run, our_time) for run in other):
            early += ", its first evaluation, later"
        lines.append(
            f"| {mine[0]['environment']} | {_scores(mine)} | {len(mine)} | {our_time:.0f} s | {_scores(other)} "
            f"| {len(other)} | {_time(other):.0f} s | {early} | {number(ratio, 1)} |"
        )
    return "\n".join(lines) + "\n"


def _ratio(rows: Rows, agent: str) -> float:
    """Our steps per second over theirs, each with its own recipe: median within rounds; NaN if not measured."""
    return median_ratio(rows.get(OUR_ROW), rows.get(best(rows, agent) or ""), "steps_per_s")


def _time(runs: list[dict[str, Any]]) -> float:
    """Seconds of a run, start and evaluations included: median."""
    return statistics.median(run["wall_s"] for run in runs)


def _steps_after(run: dict[str, Any], time: float) -> float:
    """How far a run had come, as if all its steps had taken the same time."""
    return run["env_steps"] * min(1.0, time / run["wall_s"])


def _return_after(run: dict[str, Any], time: float) -> float:
    """Of a run's last evaluation until then, a few episodes, or its first if there is none."""
    within = int(np.searchsorted(run["evaluations"]["env_steps"], _steps_after(run, time), side="right"))
    return float(run["evaluations"]["mean"][max(within - 1, 0)])


def _scores(runs: list[dict[str, Any]]) -> str:
    return _mean_and_std([float(np.mean(run["returns"])) for run in runs])


def _mean_and_std(scores: list[float]) -> str:
    return f"{np.mean(scores):.1f} ± {np.std(scores):.1f}"
