"""Trains a policy: `python scripts/train.py --config configs/pendulum.yaml`, or with the defaults `--env Hopper-v5`."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
from pathlib import Path

from trpo.command_line import CommandParser, run_command
from trpo.config import Config
from trpo.config.difference import config_difference
from trpo.config.file import load_config, parse_config
from trpo.errors import UserError
from trpo.run.directory import RunDirectory, find_run
from trpo.run.trust import named_code
from trpo.trainer import Trainer


def main() -> int:
    args = _parse()
    config, resume = _settings(args)
    start_from = args.start_from
    if start_from is not None and resume is not None and args.resume == "auto":
        start_from = None
        if _leads():
            print(f"resumes {resume}; --from is ignored, since that run has a policy")
    evaluate = [_python(), os.path.relpath(Path(__file__).with_name("evaluate.py"))]  # seen from here
    trainer = Trainer(config, root=args.root, resume=resume, start_from=start_from)
    if trainer.group.leads:
        print(f"{config.env.id} on {trainer.device}, in {trainer.run}", flush=True)
    result = trainer.train()
    if trainer.group.leads and result.evaluation is not None:
        print(f"last policy, deterministic: {result.evaluation}")
        trust = ["--trust-code"] if config.policy.body or named_code(config.env) else []
        print(f"saved in {trainer.run}; evaluate it with: {shlex.join([*evaluate, str(trainer.run), *trust])}")
    return result.exit_status


def _leads() -> bool:
    """Whether this is the one process that prints, among those that `torchrun` started."""
    return os.environ.get("RANK", "0") == "0"


def _python() -> str:
    """How to call this Python: where `make` was called, the `python` on the path may be another, without packages."""
    found = shutil.which("python")
    same = found is not None and Path(found).parent == Path(sys.executable).parent
    return "python" if same else os.path.relpath(sys.executable)


def _parse() -> argparse.Namespace:
    parser = CommandParser(description="Train a policy with TRPO.")
    parser.add_argument("--config", metavar="FILE", help="YAML file, e.g. configs/pendulum.yaml")
    parser.add_changes("change a setting")
    parser.add_argument(
        "--env", metavar="ID", help="train this environment: in place of the file's, or with all defaults"
    )
    parser.add_argument("--seed", metavar="N", help="short for --set seed=N")
    parser.add_argument("--device", metavar="D", help="short for --set device=D: cpu, cuda or auto")
    parser.add_argument("--name", metavar="X", help="short for --set name=X")
    parser.add_argument(
        "--resume",
        metavar="RUN|auto",
        help="go on in a run directory; auto: the newest run of the config's environment, name and seed, if there is "
        "one, which has to have its settings",
    )
    parser.add_argument(
        "--from",
        dest="start_from",
        metavar="POLICY",
        help="begin a new run with a saved policy, not with a random one: pretrained/Hopper-v5, or another run",
    )
    parser.add_argument("--root", default="runs", metavar="DIR", help="where runs are kept (default: runs)")
    return parser.parse_args()


def _settings(args: argparse.Namespace) -> tuple[Config, Path | None]:
    """The config to train with, and the run to go on in."""
    text = {"env.id": args.env, "device": args.device, "name": args.name}
    overrides = list(args.set)
    if args.seed is not None:
        overrides.append(f"seed={args.seed}")
    # Quoted: a name like 3 is text, not a number.
    overrides += [f"{key}={json.dumps(value)}" for key, value in text.items() if value is not None]
    given: Config | None = None
    if args.config is not None:
        given = load_config(args.config, overrides)
    elif args.env is not None and args.resume in (None, "auto"):
        given = parse_config("{}", source="defaults", overrides=overrides)
    if args.resume not in (None, "auto"):
        run: Path | None = Path(args.resume)
    elif given is None:
        raise UserError("say what to train: --config FILE, for example configs/pendulum.yaml, or --env ID")
    else:
        run = find_run(Path(args.root), given) if args.resume else None
        if args.resume and run is None and _leads():
            which = f"{given.env.id}, name {given.name}, seed {given.seed}"
            print(f"no run of {which} to go on with in {args.root}: begins a new one")
        if run is None:
            return given, None
    assert run is not None
    directory = RunDirectory.open(run)
    saved = load_config(directory.config_file, overrides)
    if given is not None and (difference := config_difference(saved, given)):
        source, changes = args.config or "--env", "; ".join(difference)
        raise UserError(
            f"{source} differs from the settings of {run} ({changes}); go on with {directory.to_resume} alone, and "
            "change settings with --set; for a new run leave --resume out"
        )
    return saved, run


if __name__ == "__main__":
    run_command(main)
