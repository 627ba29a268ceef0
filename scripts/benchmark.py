"""Benchmarks: `python scripts/benchmark.py learn --suite classic --seeds 5`, `python scripts/benchmark.py speed`."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path

from trpo.command_line import CommandParser, at_least, run_command
from trpo.benchmark.learning import SUITES, plan, run
from trpo.benchmark.learning_results import AGENTS, write_tables
from trpo.benchmark.side_by_side import side_by_side
from trpo.benchmark.speed import PARTS, QUICK, TASKS, Extent, run_speed
from trpo.errors import UserError


def main() -> int:
    args = _parse()
    command = shlex.join(["python", "scripts/benchmark.py", *sys.argv[1:]])
    return _learn(args, command) if args.command == "learn" else _speed(args, command)


def _learn(args: argparse.Namespace, command: str) -> int:
    tasks = args.task or (SUITES[args.suite] if args.suite else [])
    if not tasks:
        raise UserError(f"say what to run: --suite {{{','.join(SUITES)}}} or --task NAME of a file in {args.configs}")
    out = Path(args.out or ("benchmarks/learning" if args.agent == "trpo" else f"benchmarks/learning-{args.agent}"))
    configs, root = Path(args.configs), Path(args.root)
    jobs = plan(tasks, args.seeds, configs=configs, out=out, root=root, overrides=args.set, agent=args.agent)
    failures = run(jobs, parallel=args.jobs, episodes=args.episodes)
    if len(failures) == len(jobs):
        return 1
    print(write_tables(out, command=command))
    if args.agent != "trpo":
        table = side_by_side(Path(args.beside), out, agent=args.agent, speed=Path(args.speed))
        made = f"Made by `{command}` of {args.beside}, {out} and {args.speed}."
        (out / "side_by_side.md").write_text(f"{made}\n\n{table}")
        print(table)
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _speed(args: argparse.Namespace, command: str) -> int:
    extent = QUICK if args.quick else Extent(rounds=args.rounds, steps=args.steps)
    tables = run_speed(
        Path(args.out or ("runs/speed" if args.quick else "benchmarks")),
        extent=extent,
        tasks=args.tasks,
        parts=args.parts,
        threads=args.threads,
        command=command,
    )
    print(tables)
    return 0


def _parse() -> argparse.Namespace:
    parser = CommandParser(description="What training reaches, and how fast, beside other implementations.")
    commands = parser.add_subparsers(dest="command", required=True)
    learn = commands.add_parser("learn", help="returns of the last policy over tasks and seeds")
    learn.add_argument("--agent", choices=AGENTS, default="trpo", help="whose TRPO to train (default: ours)")
    learn.add_argument(
        "--beside", default="benchmarks/learning", metavar="DIR", help="results of ours to compare another agent with"
    )
    learn.add_argument(
        "--speed", default="benchmarks/speed.json", metavar="FILE", help="of the speed benchmark: how fast both train"
    )
    learn.add_argument("--suite", choices=sorted(SUITES))
    learn.add_argument("--task", action="append", metavar="NAME", help="a config by name; may be repeated")
    learn.add_argument("--seeds", type=at_least(1), default=5, help="seeds 0 … N−1 (default: 5)")
    learn.add_argument(
        "--jobs", type=at_least(1), default=os.cpu_count(), help="runs at a time (default: one per core)"
    )
    learn.add_argument("--episodes", type=at_least(1), default=20, help="episodes of each last policy (default: 20)")
    learn.add_argument("--out", metavar="DIR", help="results and tables (default: benchmarks/learning[-AGENT])")
    learn.add_argument("--root", default="runs/benchmark", metavar="DIR", help="run directories")
    learn.add_argument("--configs", default="configs", metavar="DIR")
    learn.add_changes("change a setting of every run")
    speed = commands.add_parser("speed", help="times of update and training beside other implementations")
    speed.add_argument(
        "--rounds", type=at_least(1), default=Extent.rounds, help="of all measurements (default: %(default)s)"
    )
    speed.add_argument(
        "--steps", type=at_least(1), default=Extent.steps, help="of each training (default: %(default)s)"
    )
    speed.add_argument("--threads", type=at_least(1), default=1, help="of each process (default: 1)")
    speed.add_argument("--tasks", nargs="+", default=TASKS, metavar="ID", help="Gymnasium ids to train on")
    speed.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS, help="what to measure (default: all)")
    speed.add_argument("--quick", action="store_true", help="one small round: whether it works, not how fast it is")
    speed.add_argument(
        "--out", metavar="DIR", help="speed.json, speed.md and speed.png (default: benchmarks, with --quick runs/speed)"
    )
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main)
