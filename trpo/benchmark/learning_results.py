"""What the learning benchmark has found: results of runs, as tables and curves."""

from __future__ import annotations

import csv
import importlib.util
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trpo.analysis.curves import Curve
from trpo.analysis.plotting import draw
from trpo.analysis.seed_statistics import bootstrap_interval, interquartile_mean
from trpo.benchmark.published import PUBLISHED
from trpo.benchmark.work import OURS, SB3
from trpo.errors import UserError, gist
from trpo.run.whole_file import whole_file

AGENTS = (OURS, SB3)


def write_result(file: Path, result: dict[str, Any]) -> None:
    """Of one run, whole or not at all."""
    with whole_file(file) as partial:
        partial.write_text(json.dumps(result, indent=1))


def read_result(file: Path) -> dict[str, Any]:
    """What `write_result` wrote.

    Raises:
        UserError: it is not that.
    """
    try:
        result = json.loads(file.read_text())
        result["returns"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged, no result of this benchmark ({gist(error)}): delete it") from error
    return result


def load_results(out: Path) -> dict[str, list[dict[str, Any]]]:
    """All finished runs under `out`, by task, ordered by seed."""
    results: dict[str, list[dict[str, Any]]] = {}
    for file in sorted(out.glob("*/seed-*.json"), key=lambda f: (f.parent.name, int(f.stem.split("-")[1]))):
        results.setdefault(file.parent.name, []).append(read_result(file))
    if not results:
        raise UserError(f"{out}: no results yet; run the benchmark first")
    return results


def write_tables(out: Path, *, command: str) -> str:
    """scores.csv (every seed), curves.csv (every evaluation of every seed), summary.md and, with matplotlib,
    curves.png; returns the summary."""
    results = load_results(out)
    with (out / "scores.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, SCORE_COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(_row(r) for r in _rows(results))
    with (out / "curves.csv").open("w", newline="") as stream:
        curves = csv.writer(stream, lineterminator="\n")
        curves.writerow(["task", "seed", "env_steps", "mean_return"])
        for r in _rows(results):
            for steps, mean in zip(r["evaluations"]["env_steps"], r["evaluations"]["mean"], strict=True):
                curves.writerow([r["task"], r["seed"], int(steps), f"{mean:.2f}"])
    commands = [*_commands(out / "summary.md"), command]
    summary = _summary(results, list(dict.fromkeys(commands)))
    (out / "summary.md").write_text(summary)
    if importlib.util.find_spec("matplotlib"):
        draw([_curve(r, out) for r in _rows(results)], "eval/mean_reward").savefig(out / "curves.png", dpi=80)
    return summary


def _curve(run: dict[str, Any], out: Path) -> Curve:
    steps, means = (np.array(run["evaluations"][key], dtype=np.float64) for key in ("env_steps", "mean"))
    agent = run["meta"].get("settings", {}).get("agent", AGENTS[0])
    return Curve(run["environment"], agent, run["seed"], steps, means, out)


SCORE_COLUMNS = (
    "task", "environment", "seed", "env_steps", "mean", "std_over_episodes", "median", "stochastic_mean", "episodes",
    "wall_s",
)  # fmt: skip


def _row(run: dict[str, Any]) -> dict[str, Any]:
    returns = run["returns"]
    return {
        **{key: run[key] for key in ("task", "environment", "seed", "env_steps")},
        "mean": f"{np.mean(returns):.2f}",
        "std_over_episodes": f"{np.std(returns):.2f}",
        "median": f"{np.median(returns):.2f}",
        "stochastic_mean": f"{np.mean(run['stochastic_returns']):.2f}",
        "episodes": len(returns),
        "wall_s": f"{run['wall_s']:.0f}",
    }


def _rows(results: dict[str, list[dict[str, Any]]]) -> Iterable[dict[str, Any]]:
    for runs in results.values():
        yield from runs


def _commands(summary: Path) -> list[str]:
    """Those that made what is there so far: results are gathered by several."""
    return re.findall(r"^- `(.+)`$", summary.read_text(), re.MULTILINE) if summary.is_file() else []


def _summary(results: dict[str, list[dict[str, Any]]], commands: Sequence[str]) -> str:
    lines = [
        "Last policy of each seed, deterministic, on Gymnasium's own environments; 95 % bootstrap over seeds. Made by",
        "",
        *(f"- `{command}`" for command in commands),
        "",
        "| Environment | Steps | Seeds | Mean ± std | 95 % interval | IQM | Worst | Best | Stochastic mean "
        "| Published TRPO | PPO, Tianshou |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for runs in results.values():
        scores = np.array([np.mean(r["returns"]) for r in runs])
        noisy = np.mean([np.mean(r["stochastic_returns"]) for r in runs])
        low, high = (float(bound[0]) for bound in bootstrap_interval(scores[:, None]))
        known = PUBLISHED.get(runs[0]["environment"])
        beside = f"{known.trpo} ({known.source}) | {known.ppo}" if known else "– | –"
        lines.append(
            f"| {runs[0]['environment']} | {runs[0]['env_steps']:,} | {len(runs)} | {scores.mean():.1f} ± "
            f"{scores.std():.1f} | {low:.1f} … {high:.1f} | {interquartile_mean(scores):.1f} | {scores.min():.1f} | "
            f"{scores.max():.1f} | {noisy:.1f} | {beside} |"
        )
    lines += ["", "What the published figures are and are not: [published.md](../published.md)."]
    return "\n".join(lines) + "\n"
