"""Tables and plot of the speed benchmark, from what was measured."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trpo.benchmark.markdown import milliseconds, number, table
from trpo.benchmark.work import OURS, SB3

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Rounds = Sequence[dict[str, float] | None]  # None: that measurement failed
Rows = dict[str, Rounds]
SHARE = ("steps_per_s", "random_steps_per_s")  # of training in random stepping

NOTES = """\
All with two tanh layers of 64, damping 0.1, KL bound 0.01, 15 CG iterations that no small residual shortens, 10 epochs
of 16 minibatches for the critic. A whole update of ours, Tianshou's and skrl's holds values, returns and advantages,
of ours statistics for the log as well; sb3-contrib computes them during the rollout, uncounted. Tianshou's critic knows
no minibatches and takes 10 steps on the whole batch: a sixteenth of the optimiser's steps. Training of ours includes
run directory, CSV and TensorBoard; of the others no logging. Random stepping draws its actions beforehand. With two
threads an update of ours fits the value function beside the policy's step, and shares rows for what is then left of it;
the others' share their matrix products. With their own recipes contenders do different work: ours has actions in 11
bins and smaller KL bounds, sb3-contrib the settings of rl-zoo, with 25 CG iterations and 20 epochs for the critic.
Those rates count in no target. All rates are of the first steps of a training, when walkers fall early; steps are
transitions, without envpool's resets.
"""


@dataclass(frozen=True)
class Target:
    """A ratio and what it should be."""

    what: str
    ratio: float  # NaN if something it needs was not measured
    bound: float
    at_least: bool  # else at most

    @property
    def met(self) -> bool:
        return self.ratio >= self.bound if self.at_least else self.ratio <= self.bound

    @property
    def row(self) -> tuple[str, ...]:
        sign = "≥" if self.at_least else "≤"
        verdict = "not measured" if math.isnan(self.ratio) else "yes" if self.met else "no"
        return self.what, "–" if math.isnan(self.ratio) else f"{self.ratio:.2f}", f"{sign} {self.bound:g}", verdict


def median(rounds: Rounds | None, key: str) -> float:
    """Over the rounds that succeeded; NaN if none did."""
    values = [numbers[key] for numbers in rounds or () if numbers is not None and key in numbers]
    return statistics.median(values) if values else math.nan


def median_ratio(above: Rounds | None, below: Rounds | None, key: str, below_key: str | None = None) -> float:
    """Median over rounds of the ratio within each: noise that meets both sides of a round cancels."""
    ratios = [
        a[key] / b[below_key or key]
        for a, b in zip(above or (), below or (), strict=False)
        if a is not None and b is not None and key in a and (below_key or key) in b
    ]
    return statistics.median(ratios) if ratios else math.nan


def best(rows: Rows, contender: str) -> str | None:
    """The row of a contender with the most steps per second."""
    rates = {row: median(rounds, "steps_per_s") for row, rounds in rows.items() if row.startswith(f"{contender}, ")}
    rates = {row: rate for row, rate in rates.items() if not math.isnan(rate)}
    return max(rates, key=rates.__getitem__, default=None)


def by_contender(rows: Rows) -> Rows:
    """Ours first, then one after the other; they were measured in turn."""

    def place(item: tuple[str, Rounds]) -> tuple[bool, str]:
        contender = item[0].partition(",")[0]
        return contender != OURS, contender

    return dict(sorted(rows.items(), key=place))


def targets(tables: dict[str, Rows]) -> list[Target]:
    """What this package claims about its speed."""
    update, memory = tables.get("update", {}), tables.get("memory", {})
    ours, sb3 = update.get(OURS), update.get(SB3)
    square = tables.get("scaling", {}).get("2048 × 64")
    found = [
        Target(f"whole update, {SB3} / ours", median_ratio(sb3, ours, "whole_s"), 5, True),
        Target(f"policy part, {SB3} / ours", median_ratio(sb3, ours, "policy_s"), 4, True),
        Target("policy part, ours / floor of its matrix products", median_ratio(square, square, "policy_s", "floor_s"),
               2, False),
        Target("policy part, ours with 50 plain iterations / with 5 preconditioned",
               median_ratio(ours, ours, "plain 50_s", "preconditioned 5_s"), 4, True),
    ]  # fmt: skip
    for name, rows in tables.items():
        if name.startswith("train "):
            found += _training_targets(name.removeprefix("train "), rows)
    for peer in (row for row in memory if row != OURS):
        ratio = median_ratio(memory.get(OURS), memory[peer], "peak_mib")
        found.append(Target(f"peak memory, ours / {peer}", ratio, 1, False))
    return found


def _training_targets(task: str, rows: Rows) -> list[Target]:
    ours, theirs = best(rows, OURS) or "", best(rows, SB3) or ""
    found = [
        Target(f"{task}: training, our best / {SB3}'s best",
               median_ratio(rows.get(ours), rows.get(theirs), "steps_per_s"), 5, True),
    ]  # fmt: skip
    for envs in (8, 16):
        above, below = rows.get(f"{OURS}, gymnasium × {envs}"), rows.get(f"{SB3}, DummyVecEnv × {envs}")
        what = f"{task}: training, {envs} environments of Gymnasium, ours / {SB3}"
        found.append(Target(what, median_ratio(above, below, "steps_per_s"), 1.7, True))
    for row in dict.fromkeys((f"{OURS}, gymnasium × 16", f"{OURS}, gymnasium × 16, 2 threads", ours)):
        if row in rows:
            share = median_ratio(rows[row], rows[row], *SHARE)
            found.append(Target(f"{task}: training / random stepping, {row}", share, 0.65, True))
    return found


def write_report(result: dict[str, Any], out: Path) -> str:
    """`speed.md` and, with matplotlib, `speed.png`; returns the tables."""
    text = report(result)
    (out / "speed.md").write_text(text)
    try:
        draw(result["tables"], out / "speed.png")
    except ImportError:
        text += "\nno plot: pip install 'trpo[plot]'\n"
    return text


def report(result: dict[str, Any]) -> str:
    tables: dict[str, Rows] = result["tables"]
    machine = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    head = (
        f"Made by `{result['command']}`: medians over {result['rounds']} rounds, contenders in turn within each; ratios"
        f" within a round.\n{machine['processor']}, {machine['cores']} cores, {result['threads']} thread(s) each; "
        f"{versions}.\n"
    )
    sections = [head, table("Targets", ("Ratio", "Measured", "Target", "Met"), [t.row for t in targets(tables)])]
    if update := tables.get("update"):
        sections += [_update_table(update), _variants_table(update.get(OURS))]
    for name, rows in tables.items():
        kind, _, task = name.partition(" ")
        if kind == "train":
            sections.append(_training_table(f"Training on {task}, updates included", rows))
        elif kind == "recipe":
            sections.append(_training_table(f"Training on {task}, each with its own recipe", rows))
    if scaling := tables.get("scaling"):
        sections.append(_scaling_table(scaling))
    if rollout := tables.get("rollout"):
        cells = [
            (row, *(number(median(r, key)) for key in SHARE), number(median_ratio(r, r, *SHARE), 2))
            for row, r in rollout.items()
        ]
        title = "Rollouts without updates, Hopper-v5 on the default backend"
        sections.append(table(title, ("Environments", "Steps/s", "Random stepping", "Share"), cells))
    if memory := tables.get("memory"):
        cells = [(row, number(median(rounds, "peak_mib"))) for row, rounds in memory.items()]
        title = "Largest resident set of a process that only trained, 16 environments in it"
        sections.append(table(title, ("Contender", "MiB"), cells))
    if result["errors"]:
        sections.append("## Failed\n\n" + "\n".join(f"- {error}" for error in result["errors"]) + "\n")
    return "\n".join([*sections, "## What is compared\n", NOTES])


def _update_table(rows: Rows) -> str:
    cells = [
        (
            row,
            *(milliseconds(median(rounds, key)) for key in ("whole_s", "policy_s", "value_s")),
            number(median_ratio(rounds, rows.get(OURS), "whole_s"), 2),
            number(median_ratio(rounds, rows.get(OURS), "policy_s"), 2),
            "yes" if median(rounds, "accepted") == 1 else "no",
        )
        for row, rounds in rows.items()
    ]
    header = ("Contender", "Whole, ms", "Policy, ms", "Value, ms", "Whole / ours", "Policy / ours", "Step accepted")
    return table("One update on 2048 transitions of Hopper-v5", header, cells)


def _variants_table(rounds: Rounds | None) -> str:
    keys = {"15 plain": ("policy_s", "gain"), "50 plain": ("plain 50_s", "plain 50_gain")}
    keys["5 preconditioned"] = ("preconditioned 5_s", "preconditioned 5_gain")
    cells = [
        (name, milliseconds(median(rounds, took)), number(median_ratio(rounds, rounds, gain, "plain 50_gain"), 3))
        for name, (took, gain) in keys.items()
    ]
    header = ("CG iterations", "Policy part, ms", "Predicted improvement at the KL bound, of that of 50")
    return table("The policy part of ours", header, cells)


def _training_table(title: str, rows: Rows) -> str:
    ours = rows.get(best(rows, OURS) or "")
    cells = [
        (
            row,
            number(median(rounds, "steps_per_s")),
            number(median_ratio(rounds, ours, "steps_per_s"), 2),
            number(median(rounds, "random_steps_per_s")),
            number(median_ratio(rounds, rounds, *SHARE), 2),
        )
        for row, rounds in by_contender(rows).items()
    ]
    header = ("Contender and environments", "Steps/s", "Of our best", "Random stepping", "Share of it")
    return table(title, header, cells)


def _scaling_table(rows: Rows) -> str:
    cells = [
        (
            row,
            *(milliseconds(median(rounds, key)) for key in ("policy_s", "value_s", "floor_s")),
            number(median_ratio(rounds, rounds, "policy_s", "floor_s"), 2),
            number(median(rounds, "flops_per_s") / 1e9, 1),
        )
        for row, rounds in rows.items()
    ]
    header = ("Batch × width", "Policy, ms", "Value, ms", "Floor, ms", "Policy / floor", "GFLOP/s of the floor")
    return table("One update of ours as it grows", header, cells)


def draw(tables: dict[str, Rows], output: Path) -> None:
    """One panel per kind of measurement that there is."""
    from matplotlib.figure import Figure

    panels: list[Callable[[Axes], None]] = []
    if update := tables.get("update"):
        panels.append(lambda axes: _draw_update(axes, update))
    for name, rows in tables.items():
        if name.startswith("train "):
            panels.append(lambda axes, name=name, rows=rows: _draw_training(axes, name[6:], rows))  # type: ignore[misc]
    if scaling := tables.get("scaling"):
        panels.append(lambda axes: _draw_scaling(axes, scaling))
    if not panels:
        return
    figure = Figure(figsize=(11, 3.6 * len(panels)), dpi=120, layout="constrained")
    for index, panel in enumerate(panels):
        axes = figure.add_subplot(len(panels), 1, index + 1)
        panel(axes)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(output)


def _draw_update(axes: Axes, rows: Rows) -> None:
    names = list(rows)[::-1]
    left = [0.0] * len(names)
    for key, label in (("policy_s", "policy"), ("value_s", "value")):
        parts = [1000 * median(rows[name], key) for name in names]
        axes.barh(names, parts, left=left, label=label)
        left = [a + b for a, b in zip(left, parts, strict=True)]
    axes.set_title("one update, 2048 transitions of Hopper-v5")
    axes.set_xlabel("ms")
    axes.legend(frameon=False)


def _draw_training(axes: Axes, task: str, rows: Rows) -> None:
    names = list(by_contender(rows))[::-1]
    colours = ["C0" if name.startswith(f"{OURS},") else "C7" for name in names]
    axes.barh(names, [median(rows[name], "steps_per_s") for name in names], color=colours)
    axes.set_title(f"training on {task}")
    axes.set_xlabel("environment steps per second, updates included")


def _draw_scaling(axes: Axes, rows: Rows) -> None:
    sizes = [tuple(map(int, row.split(" × "))) for row in rows]
    for index, width in enumerate(sorted({width for _, width in sizes})):
        batches = sorted(batch for batch, w in sizes if w == width)
        for key, style, label in (("policy_s", "o-", f"width {width}"), ("floor_s", ":", f"floor, width {width}")):
            times = [1000 * median(rows[f"{batch} × {width}"], key) for batch in batches]
            axes.loglog(batches, times, style, color=f"C{index}", label=label)
    axes.set_title("policy part of ours and its floor")
    axes.set_xlabel("batch")
    axes.set_ylabel("ms")
    axes.legend(frameon=False, fontsize=8)
