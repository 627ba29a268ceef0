"""Speed against other implementations: one process each, measured in turn, round after round.

Noise of the machine so meets all alike: ratios are taken within a round, and their median over rounds is what counts.
Everything measured is kept in `speed.json`; tables and plot are made from it alone (`speed_report`).
"""

from __future__ import annotations

import json
import os
import platform
import select
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from trpo.benchmark import peer_learning, peers, speed_report
from trpo.benchmark.work import OURS, SB3
from trpo.config import EnvConfig
from trpo.envs.single import close_env, make_single_env
from trpo.errors import UserError

PARTS = ("update", "train", "recipes", "scaling", "memory")
TASKS = ("Hopper-v5", "HalfCheetah-v5")
# contender → name → how environments are run; threads of updates
SETUPS: dict[str, dict[str, dict[str, Any]]] = {
    OURS: {
        "gymnasium × 8": {"backend": "gymnasium", "num_envs": 8},
        "gymnasium × 16": {"backend": "gymnasium", "num_envs": 16},
        "gymnasium-async × 16": {"backend": "gymnasium-async", "num_envs": 16},
        "mujoco × 16, 1 worker": {"backend": "mujoco", "num_envs": 16, "workers": 1},
        "envpool × 16, 1 worker": {"backend": "envpool", "num_envs": 16, "workers": 1},
        "gymnasium × 16, 2 threads": {"backend": "gymnasium", "num_envs": 16, "threads": 2},
        "mujoco × 16, 2 workers, 2 threads": {"backend": "mujoco", "num_envs": 16, "workers": 2, "threads": 2},
        "mujoco × 64, 2 workers, 2 threads": {"backend": "mujoco", "num_envs": 64, "workers": 2, "threads": 2},
        "envpool × 16, 2 workers, 2 threads": {"backend": "envpool", "num_envs": 16, "workers": 2, "threads": 2},
    },
    SB3: {
        **{f"DummyVecEnv × {n}": {"num_envs": n} for n in (8, 16)},  # beside ours of as many
        "SubprocVecEnv × 8": {"num_envs": 8, "subprocesses": True},
        **{f"DummyVecEnv × {n}": {"num_envs": n} for n in (1, 2)},
        "DummyVecEnv × 16, 2 threads": {"num_envs": 16, "threads": 2},
        "DummyVecEnv × 64": {"num_envs": 64},
        "DummyVecEnv × 64, 2 threads": {"num_envs": 64, "threads": 2},
    },
    "tianshou": {f"DummyVectorEnv × {n}": {"num_envs": n} for n in (16, 64)},
    "skrl": {f"SyncVectorEnv × {n}": {"num_envs": n} for n in (16, 64)},
}
# The same of what each is trained with where returns are compared, other work for each.
RECIPE_TASKS = ("HalfCheetah-v5", "Hopper-v5", "Walker2d-v5")
RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    OURS: {
        name: SETUPS[OURS][name]
        for name in (
            "gymnasium × 16",
            "mujoco × 16, 1 worker",
            "mujoco × 16, 2 workers, 2 threads",
            "envpool × 16, 1 worker",
            "envpool × 16, 2 workers, 2 threads",
        )
    },
    SB3: {
        f"rl-zoo, DummyVecEnv × {peer_learning.ENVS}": {"num_envs": peer_learning.ENVS},
        f"rl-zoo, DummyVecEnv × {peer_learning.ENVS}, 2 threads": {"num_envs": peer_learning.ENVS, "threads": 2},
    },
}
MEMORY_SETUPS = {  # 16 environments in the process itself
    OURS: "gymnasium × 16",
    SB3: "DummyVecEnv × 16",
    "tianshou": "DummyVectorEnv × 16",
    "skrl": "SyncVectorEnv × 16",
}
ANSWER_WITHIN_S = 900


@dataclass(frozen=True)
class Extent:
    """How much is measured."""

    rounds: int = 5
    repeats: int = 5  # of an update within a round
    steps: int = 10_240  # at least, of each training
    batches: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384)
    widths: tuple[int, ...] = (64, 128, 256)
    envs: tuple[int, ...] = (1, 4, 16, 64)


QUICK = Extent(rounds=1, repeats=1, steps=2048, batches=(1024, 2048), widths=(64,), envs=(1, 16))


@dataclass(frozen=True)
class Measurement:
    contender: str
    table: str
    row: str
    request: dict[str, Any] = field(hash=False)


def run_speed(
    out: Path,
    *,
    extent: Extent,
    tasks: Sequence[str] = TASKS,
    parts: Sequence[str] = PARTS,
    threads: int = 1,
    command: str = "",
    say: Callable[[str], None] = print,
) -> str:
    """Measures, and writes `speed.json`, `speed.md` and `speed.png` under `out`; returns the tables.

    Raises:
        EnvError: there is no such task.
        UserError: nothing could be measured.
    """
    for task in tasks:
        close_env(make_single_env(EnvConfig(id=task)))
    contenders = [OURS, *peers.installed()]
    for name in peers.PACKAGES:
        if name not in contenders:
            say(f"left out, not installed: {name} (pip install 'trpo[peers]')")
    children = {name: Child(name, threads) for name in contenders}
    errors: list[str] = []
    tables: dict[str, dict[str, list[Any]]] = {}

    def note(measurement: Measurement, answer: dict[str, Any]) -> None:
        where = f"{measurement.contender}, {measurement.table}, {measurement.row}"
        if "error" in answer:
            errors.append(f"{where}: {answer['error']}")
            say(f"failed: {errors[-1]}")
        tables.setdefault(measurement.table, {}).setdefault(measurement.row, []).append(answer.get("numbers"))

    try:
        versions = children[OURS].call({"call": "versions"}).get("numbers", {})
        if "envpool" not in versions:
            say("left out, not installed: the envpool backend (pip install 'trpo[envpool]')")
        todo = list(plan_speed(contenders, tasks, parts, extent, envpool="envpool" in versions))
        for number in range(1, extent.rounds + 1):
            for measurement in todo:
                note(measurement, children[measurement.contender].call(measurement.request))
            say(f"round {number} of {extent.rounds}")
    finally:
        for child in children.values():
            child.close()
    if "memory" in parts:
        for name in contenders:
            note(Measurement(name, "memory", name, {}), _peak_memory(name, tasks[0], extent.steps, threads))
    if not any(any(rounds) for rows in tables.values() for rounds in rows.values()):
        raise UserError(f"nothing could be measured, and {out} is as it was: {errors[0]}")
    result = {
        "command": command,
        "threads": threads,
        "rounds": extent.rounds,
        "versions": versions,
        "machine": {"processor": processor(), "cores": os.cpu_count(), "platform": platform.platform()},
        "tables": tables,
        "errors": errors,
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "speed.json").write_text(json.dumps(result, indent=1))
    return speed_report.write_report(result, out)


def plan_speed(
    contenders: Sequence[str], tasks: Sequence[str], parts: Sequence[str], extent: Extent, *, envpool: bool
) -> Iterator[Measurement]:
    """One round: contenders in turn, measurement by measurement."""
    plans = (_plan(name, tasks, parts, extent, envpool) for name in contenders)
    for in_turn in zip_longest(*plans):
        yield from (measurement for measurement in in_turn if measurement is not None)


def _plan(name: str, tasks: Sequence[str], parts: Sequence[str], extent: Extent, envpool: bool) -> list[Measurement]:
    plan = []

    def add(table: str, row: str, call: str, **keywords: Any) -> None:
        plan.append(Measurement(name, table, row, {"call": call, **keywords}))

    def add_training(table: str, task: str, setups: dict[str, dict[str, Any]], **more: Any) -> None:
        for setup_name, setup in setups.items():
            if envpool or setup.get("backend") != "envpool":
                row = f"{name}, {setup_name}"
                add(f"{table} {task}", row, "train", task=task, setup=setup, steps=extent.steps, **more)

    if "update" in parts:
        add("update", name, "update", repeats=extent.repeats)
    if "train" in parts:
        for task in tasks:
            add_training("train", task, SETUPS[name], **({"random": True} if name == OURS else {}))
    if "recipes" in parts:
        for task in dict.fromkeys((*RECIPE_TASKS, *tasks)):
            add_training("recipe", task, RECIPES.get(name, {}), recipe=True)
    if "scaling" in parts and name == OURS:
        for width in extent.widths:
            for batch in extent.batches:
                add("scaling", f"{batch} × {width}", "scaling", batch=batch, hidden=width, repeats=extent.repeats)
        for envs in extent.envs:
            add("rollout", str(envs), "rollout", envs=envs, steps=extent.steps)
    return plan


class Child:
    """The process of one contender, and one question at a time to it."""

    def __init__(self, name: str, threads: int):
        count = str(threads)
        limits = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "trpo.benchmark.contender", name, "--threads", count],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, **dict.fromkeys(limits, count)},
        )

    def call(self, request: dict[str, Any]) -> dict[str, Any]:
        """{"numbers": …}, or {"error": one line} whatever goes wrong."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
        except OSError:
            return {"error": f"its process is gone: {self._last_words()}"}
        ready, _, _ = select.select([self._process.stdout], [], [], ANSWER_WITHIN_S)
        if not ready:
            self._process.kill()
            return {"error": f"no answer within {ANSWER_WITHIN_S} s"}
        line = self._process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"error": f"its process died: {self._last_words()}"}
        return answer

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.close()
            self._process.wait(timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()


def _peak_memory(name: str, task: str, steps: int, threads: int) -> dict[str, Any]:
    """Of a process that did one training and nothing else."""
    child = Child(name, threads)
    try:
        setup = SETUPS[name][MEMORY_SETUPS[name]]
        trained = child.call({"call": "train", "task": task, "setup": setup, "steps": steps})
        return trained if "error" in trained else child.call({"call": "memory"})
    finally:
        child.close()


def processor() -> str:
    try:
        lines: Iterable[str] = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
