"""Trains under a rain of faults, then compares with the run that was left alone.

    python benchmarks/soak.py --minutes 10

Every few seconds something happens to a trainer with worker processes: it is killed, told to stop, loses a worker; the
newest checkpoint is damaged, logs end amid a line. Each time `train.py --resume auto` is started again. At the end the
run that came through has to be, to the bit, what one process makes of as many updates: networks, optimiser, statistics,
random streams, environments, best policy, and all that was logged except the time.

With `env.on_worker_failure=restart`, the second part, a lost worker cuts episodes, so that run is another one. What
holds then: all numbers finite, and no more transitions missing than one row of each environment of a lost worker.

Writes `soak.json` and `soak.md` beside this file. Linux only (it looks for worker processes in /proc).
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trpo.config import Config
from trpo.config.file import dump_config, load_config
from trpo.errors import CheckpointError
from trpo.run.checkpoint import checkpoint_paths, load_state, newest_checkpoint
from trpo.run.directory import find_run
from trpo.trainer import Trainer

HERE = Path(__file__).resolve().parent
TRAIN = HERE.parent / "scripts" / "train.py"
SETTINGS = (
    "total_steps=100_000_000",  # never reached: the clock ends the run
    "device=cpu",
    "env.backend=gymnasium-async",
    "env.workers=2",
    "env.max_restarts=1_000_000",
    "evaluation.every_steps=10_240",
    "evaluation.episodes=2",
    "checkpoint.every_steps=1",  # after every update
)
WORKERS_GONE_S = 2.0


@dataclass
class Tally:
    """What happened to one run."""

    faults: Counter[str] = field(default_factory=Counter)
    starts: int = 0
    steps_made_again: int = 0  # environment steps beyond the checkpoint that was resumed from
    slowest_worker_exit_s: float = 0.0


class Soak:
    """One run under faults.

    Args:
        config: what is trained.
        root: where its run directory is made.
        rng: chooses the faults and their times.
    """

    def __init__(self, config: Config, root: Path, rng: random.Random) -> None:
        self.config = config
        self.root = root
        self.rng = rng
        self.tally = Tally()
        self.file = root / "config.yaml"
        self.file.write_text(dump_config(config), encoding="utf-8")
        self.process: subprocess.Popen[str] | None = None
        self.survives_workers = config.env.on_worker_failure == "restart"

    @property
    def run(self) -> Path | None:
        """The run directory, once it has a checkpoint."""
        return find_run(self.root, self.config)

    def rain(self, seconds: float, pause_s: float) -> Path:
        """Trains for `seconds`, with a fault after every `pause_s` on average; returns the run directory."""
        faults = {
            self.kill: 3,
            self.terminate: 3,
            self.interrupt: 2,
            self.kill_worker: 30 if self.survives_workers else 4,  # cheap where no trainer has to start again
            self.kill_at_start: 2,
            self.flip_a_bit: 2,
            self.truncate_checkpoint: 2,
            self.tear_logs: 2,
        }
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            (fault,) = self.rng.choices([*faults], weights=[*faults.values()])
            if fault != self.kill_at_start:
                self.let_it_train()
                time.sleep(self.rng.uniform(0.0, 2 * pause_s))
            self.inject(fault)
        self.let_it_train()
        self.stop(signal.SIGTERM, {143})
        run = self.run
        assert run is not None
        return run

    def inject(self, fault: Callable[[], None]) -> None:
        fault()
        self.tally.faults[fault.__name__] += 1
        print(f"{fault.__name__:20} {self.steps():>10,} steps saved", flush=True)

    def let_it_train(self) -> None:
        """Starts a trainer unless one runs, and waits for its first update."""
        if self.process is not None:
            return
        before = self.steps()
        self.start()
        assert self.process is not None and self.process.stdout is not None
        for line in self.process.stdout:
            if "steps/s" in line:
                break
        else:
            raise RuntimeError(f"the trainer ended before its first update: {self.output()}")
        resumed = self.steps()
        if before and resumed < before:
            self.tally.steps_made_again += before - resumed

    def start(self) -> None:
        command = [sys.executable, str(TRAIN), "--config", str(self.file), "--root", str(self.root), "--resume", "auto"]
        self.tally.starts += 1
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    def steps(self) -> int:
        """Environment steps of the newest checkpoint, valid or not."""
        run = self.run
        return int(checkpoint_paths(run / "checkpoints")[0].name.removeprefix("step-")) if run else 0

    def output(self) -> str:
        assert self.process is not None
        out, err = self.process.communicate()
        return f"exit status {self.process.returncode}\n{out[-2000:]}\n{err[-2000:]}"

    def stop(self, how: signal.Signals, expected: set[int], *, group: bool = False) -> None:
        """Sends a signal to the trainer or its process group, and checks how it ends and that its workers do."""
        process = self.process
        assert process is not None
        workers = children(process.pid)
        (os.killpg if group else os.kill)(process.pid, how)
        sent = time.monotonic()
        text = self.output()
        if process.returncode not in expected:
            raise RuntimeError(f"{how.name} ended the trainer unexpectedly: {text}")
        while any(map(alive, workers)):
            if time.monotonic() - sent > WORKERS_GONE_S and how == signal.SIGKILL:
                raise RuntimeError(f"workers {workers} outlived their trainer")
            time.sleep(0.005)
        if how == signal.SIGKILL:
            self.tally.slowest_worker_exit_s = max(self.tally.slowest_worker_exit_s, time.monotonic() - sent)
        self.process = None

    def kill(self) -> None:
        self.stop(signal.SIGKILL, {-signal.SIGKILL})

    def terminate(self) -> None:
        self.stop(signal.SIGTERM, {143}, group=True)

    def interrupt(self) -> None:
        self.stop(signal.SIGINT, {130}, group=True)

    def kill_at_start(self) -> None:
        """At a random moment of the imports, the making of environments, the restoring, the first updates."""
        if self.process is not None:
            self.kill()
        self.start()
        time.sleep(self.rng.uniform(0.0, 6.0))
        self.kill()

    def kill_worker(self) -> None:
        """The trainer reports it and ends, or with `restart` replaces it and goes on."""
        process = self.process
        assert process is not None
        os.kill(self.rng.choice(children(process.pid)), signal.SIGKILL)
        if self.survives_workers:
            return
        text = self.output()
        if process.returncode != 2 or "was killed by SIGKILL" not in text:
            raise RuntimeError(f"the loss of a worker was not reported: {text}")
        self.process = None

    def flip_a_bit(self) -> None:
        self.kill()
        if file := self.file_to_damage():
            data = bytearray(file.read_bytes())
            data[self.rng.randrange(len(data))] ^= 1 << self.rng.randrange(8)
            file.write_bytes(data)

    def truncate_checkpoint(self) -> None:
        self.kill()
        if file := self.file_to_damage():
            os.truncate(file, self.rng.randrange(file.stat().st_size))

    def file_to_damage(self) -> Path | None:
        """A file of the newest checkpoint; None if it is the last valid one."""
        run = self.run
        paths = checkpoint_paths(run / "checkpoints") if run else []
        if sum(map(is_valid, paths)) < 2:
            return None
        return self.rng.choice(sorted(paths[0].iterdir()))

    def tear_logs(self) -> None:
        """As if killed amid writing: a row and a record that end too early."""
        self.kill()
        if run := self.run:
            for file in (run / "progress.csv", *sorted(run.glob("events.out.tfevents.*"))[-1:]):
                content = file.read_bytes()
                with file.open("ab") as opened:
                    opened.write(content[: self.rng.randrange(1, 80)])


def is_valid(path: Path) -> bool:
    try:
        load_state(path)
    except CheckpointError:
        return False
    return True


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def state_of(run: Path) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # damaged checkpoints are known of
        found = newest_checkpoint(run / "checkpoints")
    assert found is not None
    state: dict[str, Any] = found[1]
    del state["counters"]["elapsed_s"]
    return state


def digest(tree: Any) -> str:
    """SHA-256 of every bit of a state, types and shapes included."""
    sha = hashlib.sha256()

    def feed(value: Any) -> None:
        if isinstance(value, dict | list | tuple):
            sha.update(f"{type(value).__name__}{len(value)}".encode())
            for item in value.items() if isinstance(value, dict) else value:
                feed(item)
        elif hasattr(value, "numpy") or hasattr(value, "tobytes"):
            array = value.numpy() if hasattr(value, "numpy") else value
            sha.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
        else:
            sha.update(f"{type(value).__name__} {value!r};".encode())

    feed(tree)
    return sha.hexdigest()


def table(file: Path) -> list[dict[str, str]]:
    """Rows of a table of metrics, without the columns that tell the time."""
    with file.open(encoding="utf-8", newline="") as opened:
        rows = [*csv.DictReader(opened)]
    return [{key: cell for key, cell in row.items() if not key.startswith("time/")} for row in rows]


def contents(run: Path) -> dict[str, str]:
    """A digest of everything that two runs which are the same have in common."""
    state = state_of(run)
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    points = {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in sorted(events.Tags()["scalars"])
        if not tag.startswith("time/")
    }
    best = load_state(run / "best") if (run / "best").is_dir() else None
    return {
        "policy": digest(state["agent"]["policy"]),
        "value function, optimiser and statistics": digest(state["agent"]),
        "random streams and environments": digest(state["processes"]),
        "whole checkpoint": digest(state),
        "best policy": digest(best),
        "progress.csv": digest(table(run / "progress.csv")),
        "evaluations.csv": digest(table(run / "evaluations.csv")),
        "TensorBoard": digest(points),
    }


def soak_exactly(config: Config, root: Path, seconds: float, pause_s: float, rng: random.Random) -> dict[str, Any]:
    """Under faults, then undisturbed, then compared."""
    soak = Soak(config, make(root / "disturbed"), rng)
    run = soak.rain(seconds, pause_s)
    counters = state_of(run)["counters"]
    print(f"undisturbed: {counters['updates']} updates in one process", flush=True)
    alone = Trainer(config, root=root / "undisturbed", console=False).train(max_updates=counters["updates"])
    ours, theirs = contents(run), contents(alone.directory)
    return {
        **figures(soak, counters),
        "same": {name: ours[name] == theirs[name] for name in ours},
        "sha256_of_checkpoint": {"disturbed": ours["whole checkpoint"], "undisturbed": theirs["whole checkpoint"]},
    }


def soak_with_restarts(
    config: Config, root: Path, seconds: float, pause_s: float, rng: random.Random
) -> dict[str, Any]:
    """Lost workers are replaced; the damage has to stay within its bound."""
    config = config.model_copy(update={"env": config.env.model_copy(update={"on_worker_failure": "restart"})})
    soak = Soak(config, make(root / "restarts"), rng)
    run = soak.rain(seconds, pause_s)
    state = state_of(run)
    counters, env = state["counters"], state["processes"][0]["collector"]["env"]
    share = -(-config.env.num_envs // 2)  # environments of the larger worker
    missing = counters["updates"] * config.batch_size - counters["env_steps"]
    steps = [int(row["env_steps"]) for row in table(run / "progress.csv")]
    return {
        **figures(soak, counters),
        "workers_replaced": env["restarts"],
        "transitions_missing": missing,
        "transitions_missing_at_most": env["restarts"] * share,
        "holds": {
            "missing transitions within the bound": 0 <= missing <= env["restarts"] * share,
            "one row an update, in order": len(steps) == counters["updates"] and steps == sorted(set(steps)),
            "all parameters and statistics finite": all_finite(state["agent"]),
        },
    }


def all_finite(tree: Any) -> bool:
    if isinstance(tree, dict | list | tuple):
        return all(map(all_finite, tree.values() if isinstance(tree, dict) else tree))
    return not isinstance(tree, torch.Tensor) or bool(torch.isfinite(tree).all())


def figures(soak: Soak, counters: dict[str, Any]) -> dict[str, Any]:
    return {
        "faults": dict(sorted(soak.tally.faults.items())),
        "trainers_started": soak.tally.starts,
        "updates": counters["updates"],
        "env_steps": counters["env_steps"],
        "steps_made_again": soak.tally.steps_made_again,
        "slowest_worker_exit_after_sigkill_s": round(soak.tally.slowest_worker_exit_s, 3),
    }


def make(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


def markdown(report: dict[str, Any]) -> str:
    lines = [
        "# Soak",
        "",
        f"`{report['command']}`: {report['minutes']:g} minutes of training under faults, {report['config']}, "
        "a checkpoint after every update, two worker processes.",
    ]
    for title, part in report["parts"].items():
        happened = ", ".join(f"{name.replace('_', ' ')} {count}×" for name, count in part["faults"].items())
        lines += [
            "",
            f"## {title}",
            "",
            f"{sum(part['faults'].values())} faults ({happened}), {part['trainers_started']} trainers started, "
            f"{part['updates']} updates of {part['env_steps']:,} environment steps kept; workers were gone "
            f"{part['slowest_worker_exit_after_sigkill_s']} s after the death of their trainer at the latest.",
        ]
        if "workers_replaced" in part:
            lines[-1] += (
                f" {part['workers_replaced']} workers were replaced; {part['transitions_missing']} transitions are "
                f"missing, at most {part['transitions_missing_at_most']} may be."
            )
        lines += ["", "| Checked | |", "|---|---|"]
        lines += [f"| {name} | {'the same' if ok else 'DIFFERENT'} |" for name, ok in part.get("same", {}).items()]
        lines += [f"| {name} | {'holds' if ok else 'VIOLATED'} |" for name, ok in part.get("holds", {}).items()]
        if "sha256_of_checkpoint" in part:
            lines += ["", *(f"- {name}: `{value}`" for name, value in part["sha256_of_checkpoint"].items())]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description="Trains under faults and compares with the undisturbed run.")
    parser.add_argument("--config", default=str(HERE.parent / "configs" / "pendulum.yaml"), metavar="FILE")
    parser.add_argument("--minutes", type=float, default=10.0, help="of training under faults (default: 10)")
    parser.add_argument("--pause", type=float, default=3.0, metavar="S", help="mean seconds between faults")
    parser.add_argument("--seed", type=int, default=0, help="chooses the faults")
    parser.add_argument("--out", type=Path, default=HERE / "soak", help="report, without its suffix")
    args = parser.parse_args()
    config = load_config(args.config, SETTINGS)
    rng = random.Random(args.seed)
    root = Path(tempfile.mkdtemp(prefix="trpo-soak-"))
    seconds = 60 * args.minutes
    parts = {
        "A lost worker ends the trainer; everything resumes": soak_exactly(
            config, root, 0.75 * seconds, args.pause, rng
        ),
        "A lost worker is replaced": soak_with_restarts(config, root, 0.25 * seconds, args.pause, rng),
    }
    report = {
        "command": f"python benchmarks/soak.py --minutes {args.minutes:g} --pause {args.pause:g} --seed {args.seed}",
        "config": Path(args.config).name,
        "minutes": args.minutes,
        "parts": parts,
    }
    args.out.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    args.out.with_suffix(".md").write_text(markdown(report), encoding="utf-8")
    print(markdown(report))
    good = all(ok for part in parts.values() for key in ("same", "holds") for ok in part.get(key, {}).values())
    if good:
        shutil.rmtree(root)
    else:
        print(f"the runs are kept in {root}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
