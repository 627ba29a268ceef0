"""Our learning results beside another implementation's: return at the same steps, and after the same time.

The time is that of rollouts and updates alone, the median over seeds, without evaluations and imports; it compares only
where both were trained on one machine, as many at a time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from trpo.benchmark.learning import load_results
from trpo.errors import UserError


def side_by_side(ours: Path, theirs: Path, *, agent: str) -> str:
    """The table of all tasks that both directories of results hold, as Markdown.

    The other agent's return after our time is that of its last evaluation until then, a few episodes; the returns at
    the same steps are of its last policy.
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
        seconds = [float(np.median([run["train_s"] for run in runs])) for runs in (mine, other)]
        share = seconds[0] / seconds[1]
        early = [_return_after(run, share) for run in other]
        lines.append(
            f"| {mine[0]['environment']} | {_scores(mine)} | {len(mine)} | {seconds[0]:.0f} s | {_scores(other)} "
            f"| {len(other)} | {seconds[1]:.0f} s | {_mean_and_std(early)} | {1 / share:.1f} |"
        )
    return "\n".join(lines) + "\n"


def _return_after(run: dict[str, Any], share: float) -> float:
    """Of the last evaluation within this share of a run's steps, which take time evenly; the first if there is none."""
    steps = np.array(run["evaluations"]["env_steps"])
    within = int(np.searchsorted(steps, share * run["env_steps"], side="right"))
    return float(run["evaluations"]["mean"][max(within - 1, 0)])


def _scores(runs: list[dict[str, Any]]) -> str:
    return _mean_and_std([float(np.mean(run["returns"])) for run in runs])


def _mean_and_std(scores: list[float]) -> str:
    return f"{np.mean(scores):.1f} ± {np.std(scores):.1f}"
