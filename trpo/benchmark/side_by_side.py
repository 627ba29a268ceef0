"""Our learning results beside another implementation's: return at the same steps, and after the same time.

Returns come from learning results, time from the speed benchmark, which trains all on one machine in turn: each with
its own recipe and one thread, ours as in `OUR_ROW`.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from trpo.benchmark.learning import load_results
from trpo.benchmark.speed import OURS
from trpo.benchmark.speed_report import best, median, median_ratio
from trpo.errors import UserError

OUR_ROW = f"{OURS}, envpool × 16, 1 worker"


def side_by_side(ours: Path, theirs: Path, *, agent: str, speed: Path) -> str:
    """The table of all tasks that both directories of results hold, as Markdown.

    The other agent's return after our time is that of its last evaluation until then, a few episodes; the returns at
    the same steps are of its last policy.

    Raises:
        UserError: no task in common, or one whose speed was not measured.
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
    for task in tasks:
        mine, other = (results[task] for results in both)
        environment = mine[0]["environment"]
        rates, ratio = _rates(speed, environment, agent)
        seconds = [runs[0]["env_steps"] / rate for runs, rate in zip((mine, other), rates, strict=True)]
        early = [_return_at(run, seconds[0] * rates[1]) for run in other]
        lines.append(
            f"| {environment} | {_scores(mine)} | {len(mine)} | {seconds[0]:.0f} s | {_scores(other)} "
            f"| {len(other)} | {seconds[1]:.0f} s | {_mean_and_std(early)} | {ratio:.1f} |"
        )
    return "\n".join(lines) + "\n"


def _rates(speed: Path, environment: str, agent: str) -> tuple[list[float], float]:
    """Steps per second of ours and theirs, and the ratio of the two within rounds."""
    rows = json.loads(speed.read_text())["tables"].get(f"recipe {environment}", {}) if speed.is_file() else {}
    ours, theirs = rows.get(OUR_ROW), rows.get(best(rows, agent) or "")
    rates = [median(rounds, "steps_per_s") for rounds in (ours, theirs)]
    if any(map(math.isnan, rates)):
        raise UserError(
            f"{speed} has no rate of training on {environment}, ours with envpool and {agent}'s: with both installed, "
            "python scripts/benchmark.py speed --parts recipes"
        )
    return rates, median_ratio(ours, theirs, "steps_per_s")


def _return_at(run: dict[str, Any], env_steps: float) -> float:
    """Of a run's last evaluation until then, or its first if there is none."""
    within = int(np.searchsorted(run["evaluations"]["env_steps"], env_steps, side="right"))
    return float(run["evaluations"]["mean"][max(within - 1, 0)])


def _scores(runs: list[dict[str, Any]]) -> str:
    return _mean_and_std([float(np.mean(run["returns"])) for run in runs])


def _mean_and_std(scores: list[float]) -> str:
    return f"{np.mean(scores):.1f} ± {np.std(scores):.1f}"
