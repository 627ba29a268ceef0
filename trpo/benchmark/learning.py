"""Learning benchmarks: many tasks and seeds, the last policy of each, honest statistics.

Every (task, seed) is a training run of its own process. What is kept of it is one JSON file under
`<out>/<task>/seed-<n>.json` with raw episode returns and all evaluations; scores, curves and tables are made from these
files alone, so that a benchmark can be interrupted, restarted, extended by seeds, and its tables made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trpo.benchmark import peer_learning
from trpo.benchmark.learning_results import read_result, write_result
from trpo.config import Config
from trpo.config.file import dump_config, load_config
from trpo.errors import UserError
from trpo.run.directory import RunDirectory, find_run
from trpo.run.metric_files import read_table
from trpo.run.metrics import EVALUATIONS_FILE, PROGRESS_FILE
from trpo.run.saved_policy import load_policy

SUITES = {
    "classic": ["pendulum", "cartpole", "acrobot", "mountain_car", "mountain_car_continuous"],
    "box2d": ["lunar_lander", "lunar_lander_continuous", "bipedal_walker"],
    "mujoco": [
        "ant",
        "half_cheetah",
        "hopper",
        "humanoid",
        "humanoid_standup",
        "inverted_double_pendulum",
        "inverted_pendulum",
        "pusher",
        "reacher",
        "swimmer",
        "walker2d",
    ],
}
EVALUATION_SEED = 1_000_003  # episodes no run evaluated itself on while training
# Settings that are younger than the first results, at their defaults: those runs had them, unsaid.
LATER = (
    "\n  options: {}\n",
    "\n  info: []\n",
    "\nreuse_rollouts: 0\n",
    "\nlearning_starts: 0\n",
    "\n  action_mask: null\n",
)


@dataclass(frozen=True)
class Job:
    """One training run of the benchmark."""

    task: str  # name of its config file
    config: Config  # of another implementation's run only environment, steps, evaluation and seed count
    runs: Path  # where run directories of all jobs lie
    result: Path  # the JSON file to write
    agent: str = "trpo"

    @property
    def fingerprint(self) -> str:
        """Of the settings: a finished run counts only for those it had. As many threads as there are cores, the
        default, change no bit, and count as one."""
        counted = self._settings_of(self.config.model_copy(update={"threads": self.config.threads or 1}))
        if self.agent == "trpo":
            for line in LATER:
                counted = counted.replace(line, "\n", 1)
        return hashlib.sha256(counted.encode()).hexdigest()[:16]

    @property
    def settings(self) -> str:
        """As the process that trains is given them."""
        return self._settings_of(self.config)

    def _settings_of(self, config: Config) -> str:
        return dump_config(config) if self.agent == "trpo" else peer_learning.settings(config)

    @property
    def log(self) -> Path:
        return self.root / "log.txt"

    @property
    def root(self) -> Path:
        """Run directories of these settings: a cut run must never go on with others."""
        name = self.task if self.agent == "trpo" else f"{self.agent}-{self.task}"
        return self.runs / f"{name}-{self.fingerprint}"

    @property
    def finished(self) -> bool:
        return self.result.exists() and read_result(self.result).get("fingerprint") == self.fingerprint


def plan(
    tasks: Iterable[str],
    seeds: int,
    *,
    configs: Path,
    out: Path,
    root: Path,
    overrides: Sequence[str] = (),
    agent: str = "trpo",
) -> list[Job]:
    """All runs of a benchmark, seed by seed so that an interrupted one has the same seeds of every task."""
    tasks = list(dict.fromkeys(tasks))
    jobs = []
    for seed in range(seeds):
        for task in tasks:
            config = load_config(configs / f"{task}.yaml", [*overrides, f"seed={seed}"])
            jobs.append(Job(task, config, root, out / task / f"seed-{seed}.json", agent))
    return jobs


def run(jobs: Sequence[Job], *, parallel: int, episodes: int, say: Callable[[str], None] = print) -> list[str]:
    """Trains what is not finished, `parallel` runs at a time, which share the cores; returns what failed, in words.

    Raises:
        UserError: results of other settings, or over another number of episodes, lie where these would go; nothing is
            trained.
    """
    done: list[Job] = []
    todo: list[Job] = []
    for job in jobs:
        (done if job.finished else todo).append(job)
    if others := [job.result for job in todo if job.result.exists()]:
        more = f" and {len(others) - 1} more hold results" if len(others) > 1 else " holds the result"
        raise UserError(f"{others[0]}{more} of other settings; give another --out, or delete them first")
    for job in done:
        if (had := len(read_result(job.result)["returns"])) != episodes:
            raise UserError(f"{job.result} holds {had} episodes; give --episodes {had}, another --out, or delete it")
    say(f"{len(jobs)} runs, {len(done)} finished before, {len(todo)} to do, {parallel} at a time")
    failures = []
    with ThreadPoolExecutor(parallel) as pool:
        outcomes = pool.map(lambda job: _train_and_score(job, episodes, parallel), todo)
        for job, failure in zip(todo, outcomes, strict=True):
            if failure is not None:
                failures.append(f"{job.task} seed {job.config.seed}: {failure}")
                say(f"FAILED {failures[-1]}")
            else:
                result = read_result(job.result)
                mean, wall = np.mean(result["returns"]), result["wall_s"]
                say(f"{job.task} seed {job.config.seed}: last policy {mean:.1f}, {wall:.0f} s")
    return failures


def _train_and_score(job: Job, episodes: int, parallel: int) -> str | None:
    """One run in a process of its own; None or why it failed. Of ours a run that was cut goes on from its checkpoint;
    one of another implementation, which has none to the bit, begins again. The cores are for `parallel` of them."""
    job.root.mkdir(parents=True, exist_ok=True)
    job.result.parent.mkdir(parents=True, exist_ok=True)
    ours = job.agent == "trpo"
    settings = job.root / ("config.yaml" if ours else "settings.json")
    settings.write_text(job.settings)
    log, scores = job.log, job.root / "scores.json"
    function = "train_one" if ours else "train_peer"
    code = f"import sys; from trpo.benchmark.learning import {function}; {function}(*sys.argv[1:])"
    with log.open("a") as stream:
        status = subprocess.run(
            [sys.executable, "-c", code, str(settings), str(scores), str(episodes)],
            stdout=stream,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": str(parallel)},
            check=False,
        ).returncode
    if status != 0:
        said = log.read_text(errors="replace").strip().splitlines()
        return f"exit status {status}, see {log}" + (f", which ends: {said[-1]}" if said else "")
    _write_result(job, json.loads(scores.read_text()))
    return None


def train_one(config_file: str, scores: str, episodes: str) -> None:
    """Trains one config to its end, going on with a run that was cut, and scores it: a process of the benchmark."""
    from trpo.trainer import Trainer

    started = time.perf_counter()
    config, root = load_config(config_file), Path(config_file).parent
    path = Trainer(config, root=root, resume=find_run(root, config)).train().directory
    result = _score(RunDirectory(path), int(episodes), wall_s=time.perf_counter() - started)
    Path(scores).write_text(json.dumps(result))


def train_peer(settings_file: str, scores: str, episodes: str) -> None:
    """Trains and scores another implementation: a process of the benchmark, too."""
    result = peer_learning.learn(json.loads(Path(settings_file).read_text()), int(episodes), seed=EVALUATION_SEED)
    Path(scores).write_text(json.dumps(result))


def _score(run: RunDirectory, episodes: int, *, wall_s: float) -> dict[str, Any]:
    saved = load_policy(run.final, trust_code=True)
    scores, stochastic = (
        saved.evaluate(episodes=episodes, seed=EVALUATION_SEED, deterministic=deterministic, trust_code=True)
        for deterministic in (True, False)
    )
    meta = json.loads(run.meta_file.read_text())
    del meta["command"]  # of this benchmark's own process, with this machine's paths: nobody could call it
    progress, evaluations = (_columns(run.path / name) for name in (PROGRESS_FILE, EVALUATIONS_FILE))
    return {
        "env_steps": saved.info["env_steps"],
        "wall_s": wall_s,
        "returns": scores.returns,
        "lengths": scores.lengths,
        "stochastic_returns": stochastic.returns,
        "evaluations": {"env_steps": evaluations["env_steps"], "mean": evaluations["eval/mean_reward"]},
        "training": {"env_steps": progress["env_steps"][::8], "return": progress["rollout/ep_rew_mean"][::8]},
        "meta": meta,
    }


def _write_result(job: Job, scores: dict[str, Any]) -> None:
    result = {
        "task": job.task,
        **({} if job.agent == "trpo" else {"agent": job.agent}),
        "environment": job.config.env.id,
        "seed": job.config.seed,
        "fingerprint": job.fingerprint,
        **scores,
    }
    write_result(job.result, result)


def _columns(path: Path) -> dict[str, list[float | None]]:
    header, rows = read_table(path)
    return {name: [float(row[i]) if row[i] else None for row in rows] for i, name in enumerate(header)}
