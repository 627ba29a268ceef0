"""Learning curves of runs, grouped over seeds: `python scripts/plot.py runs/Pendulum-v1 --out curves.png`."""

from __future__ import annotations

from pathlib import Path

from trpo.command_line import CommandParser, run_command
from trpo.analysis.plotting import DEFAULT_METRIC, plot_runs


def main() -> None:
    parser = CommandParser(description="Draw learning curves: one panel per environment, mean and interval over seeds.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's directory, or one that holds runs")
    parser.add_argument("--out", type=Path, default=Path("curves.png"), help="image to write (default: %(default)s)")
    parser.add_argument("--metric", default=DEFAULT_METRIC, help="column to draw (default: %(default)s)")
    arguments = parser.parse_args()
    endings = plot_runs(arguments.runs, arguments.out, metric=arguments.metric)
    print(arguments.out)
    print(f"{arguments.metric}, the last of each seed, on average:")
    for ending in endings:
        print(f"  {ending}")


if __name__ == "__main__":
    run_command(main)
