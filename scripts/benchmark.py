"""Benchmarks: `python scripts/benchmark.py learn --suite classic --seeds 5`."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path

from trpo.benchmark import SUITES, plan, run, write_tables
from trpo.errors import CommandParser, UserError, run_command


def main() -> int:
    args = _parse()
    tasks = args.task or (SUITES[args.suite] if args.suite else [])
    if not tasks:
        raise UserError(f"say what to run: --suite {{{','.join(SUITES)}}} or --task NAME of a file in {args.configs}")
    out = Path(args.out)
    jobs = plan(tasks, args.seeds, configs=Path(args.configs), out=out, root=Path(args.root), overrides=args.set)
    failures = run(jobs, parallel=args.jobs, episodes=args.episodes)
    print(write_tables(out, command=shlex.join(["python", "scripts/benchmark.py", *sys.argv[1:]])))
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _parse() -> argparse.Namespace:
    parser = CommandParser(description="Train many tasks over seeds and tabulate the last policies.")
    commands = parser.add_subparsers(dest="command", required=True)
    learn = commands.add_parser("learn", help="returns of the last policy over tasks and seeds")
    learn.add_argument("--suite", choices=sorted(SUITES))
    learn.add_argument("--task", action="append", metavar="NAME", help="a config by name; may be repeated")
    learn.add_argument("--seeds", type=int, default=5, help="seeds 0 … N−1 (default: 5)")
    learn.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time (default: one per core)")
    learn.add_argument("--episodes", type=int, default=100, help="episodes of each last policy (default: 100)")
    learn.add_argument("--out", default="benchmarks/learning", metavar="DIR", help="results and tables")
    learn.add_argument("--root", default="runs/benchmark", metavar="DIR", help="run directories")
    learn.add_argument("--configs", default="configs", metavar="DIR")
    learn.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main)
