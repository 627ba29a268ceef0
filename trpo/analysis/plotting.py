"""Learning curves of runs as a picture, grouped over seeds."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trpo.analysis.curves import Curve, Ending, aggregate, endings, grouped, read_curves
from trpo.errors import UserError
from trpo.run.whole_file import whole_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DEFAULT_METRIC = "rollout/ep_rew_mean"
AXIS_LABELS = {
    "rollout/ep_rew_mean": "mean return, training",
    "rollout/ep_len_mean": "mean episode length, training",
    "rollout/success_rate": "success rate, training",
    "eval/mean_reward": "mean return, evaluation",
    "eval/mean_ep_length": "mean episode length, evaluation",
    "eval/success_rate": "success rate, evaluation",
}

LABEL_WIDTH, LABEL_CHARACTERS = 60, 200


def plot_runs(directories: Sequence[str | Path], output: str | Path, *, metric: str = DEFAULT_METRIC) -> list[Ending]:
    """Draws a metric against environment steps: one panel per environment, one colour per name, a mean over seeds.

    The metric is looked for in `progress.csv`, then in `evaluations.csv` and in `recorded.csv`. Runs of one name that
    learned with different settings get a colour for each, labelled with what differs; so do those that share settings
    and seeds in directories given one by one. Where several runs of one directory share environment, name, settings
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
    output = Path(output)
    drawn = read_curves([Path(directory) for directory in directories], metric)
    figure = draw(drawn, metric)
    image = io.BytesIO()
    try:
        figure.savefig(image, format=output.suffix.removeprefix(".") or "png")
        with whole_file(output) as file:
            file.write_bytes(image.getvalue())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {output}: {getattr(error, 'strerror', None) or error}") from error
    return endings(drawn)


def draw(curves: Sequence[Curve], metric: str) -> Figure:
    """One panel per environment, readable at the width of a README.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("plots need matplotlib: pip install 'trpo[plot]'") from error
    panels = grouped(curves, lambda curve: curve.env_id)
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

    for index, (name, members) in enumerate(grouped(curves, lambda curve: curve.name).items()):
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
