"""The learning benchmark: statistics by hand, and a real run that is interrupted, restarted and extended."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

from trpo.analysis.seed_statistics import interquartile_mean
from trpo.benchmark import peer_learning
from trpo.benchmark.learning import SUITES, plan, run
from trpo.benchmark.learning_results import load_results, write_tables
from trpo.benchmark.side_by_side import OUR_ROW, side_by_side
from trpo.config.file import load_config
from trpo.errors import UserError
from trpo.evaluation import evaluate
from trpo.runtime.cores import worker_count

TINY = """\
env: {id: CartPole-v1, num_envs: 2}
total_steps: 128
batch_size: 64
policy: {hidden_sizes: [8]}
value: {hidden_sizes: [8], fit: gauss_newton}
evaluation: {every_steps: 64, episodes: 1, final_episodes: 1}
"""


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([1.0, 2.0, 3.0, 100.0], 2.5),  # the middle two of four
        ([5.0], 5.0),
        # Of five, each worth 1/5, the middle half [0.25, 0.75] takes ¾ of the second, the third and ¾ of the fourth.
        ([0.0, 10.0, 20.0, 40.0, 1e9], (0.15 * 10 + 0.2 * 20 + 0.15 * 40) / 0.5),
    ],
)
def test_interquartile_mean_by_hand(scores: list[float], expected: float) -> None:
    assert interquartile_mean(np.array(scores)) == pytest.approx(expected, rel=1e-12)


def test_runs_are_scored_once_tabulated_and_a_broken_one_is_reported(tmp_path: Path) -> None:
    configs = tmp_path / "configs"
    configs.mkdir()
    (configs / "tiny.yaml").write_text(TINY)
    (configs / "broken.yaml").write_text(TINY.replace("num_envs: 2", "num_envs: 2, kwargs: {no_such_argument: 1}"))
    out, root = tmp_path / "out", tmp_path / "runs"

    def jobs(tasks: list[str], seeds: int) -> list:
        return plan(tasks, seeds, configs=configs, out=out, root=root)

    said: list[str] = []
    (failure,) = run(jobs(["tiny", "broken"], 1), parallel=2, episodes=2, say=said.append)
    assert failure.startswith("broken seed 0") and "no_such_argument" in next(root.glob("broken-*/log.txt")).read_text()
    first = out / "tiny" / "seed-0.json"
    stamp = first.stat().st_mtime_ns
    assert run(jobs(["tiny"], 2), parallel=1, episodes=2, say=said.append) == []
    assert first.stat().st_mtime_ns == stamp  # a finished run is not repeated
    assert said[-2].startswith("2 runs, 1 finished before")

    results = load_results(out)["tiny"]
    assert [r["seed"] for r in results] == [0, 1]
    assert all(len(r["returns"]) == 2 and r["env_steps"] == 128 for r in results)
    write_tables(out, command="an earlier command")
    for _ in range(2):
        summary = write_tables(out, command="a command")
    assert "\n- `an earlier command`\n- `a command`\n\n" in summary and (out / "summary.md").read_text() == summary
    with (out / "scores.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [float(row["mean"]) for row in rows] == [np.mean(json.loads(first.read_text())["returns"]), rows_mean(out)]


def test_runs_at_the_same_time_share_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or two of them would start a worker on every core each."""
    shares: list[int] = []

    def trains(*_: object, env: dict[str, str], **__: object) -> subprocess.CompletedProcess[bytes]:
        with monkeypatch.context() as context:
            context.setattr(os, "environ", env)
            shares.append(worker_count(0, 1000))
        return subprocess.CompletedProcess([], 1)

    monkeypatch.setattr(subprocess, "run", trains)
    (tmp_path / "tiny.yaml").write_text(TINY)
    job = plan(["tiny"], 1, configs=tmp_path, out=tmp_path / "out", root=tmp_path / "runs")
    run(job, parallel=10_000, episodes=1, say=lambda _: None)
    assert shares == [1]


def rows_mean(out: Path) -> float:
    return float(np.mean(json.loads((out / "tiny" / "seed-1.json").read_text())["returns"]))


def test_a_run_of_other_settings_does_not_count_as_finished(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    job, one_thread, *others = (
        plan(["tiny"], 1, configs=tmp_path, out=tmp_path / "out", root=tmp_path / "runs", overrides=overrides)[0]
        for overrides in ([], ["threads=1"], ["threads=2"], ["gae.gamma=0.5"])
    )
    job.result.parent.mkdir(parents=True)
    job.result.write_text(json.dumps({"fingerprint": job.fingerprint, "returns": []}))
    assert job.finished and one_thread.finished
    assert not any(other.finished for other in others)


def test_results_of_other_settings_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    jobs = plan(["tiny"], 2, configs=tmp_path, out=tmp_path / "out", root=tmp_path / "runs")
    jobs[0].result.parent.mkdir(parents=True)
    for job in jobs:
        job.result.write_text(json.dumps({"fingerprint": "another", "returns": []}))
    with pytest.raises(UserError, match=r"seed-0.json and 1 more hold results of other settings; give another --out"):
        run(jobs, parallel=1, episodes=1)
    assert not (tmp_path / "runs").exists()
    assert all(json.loads(job.result.read_text())["fingerprint"] == "another" for job in jobs)


def test_results_over_another_number_of_episodes_are_not_taken_for_finished(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    (job,) = plan(["tiny"], 1, configs=tmp_path, out=tmp_path / "out", root=tmp_path / "runs")
    job.result.parent.mkdir(parents=True)
    job.result.write_text(json.dumps({"fingerprint": job.fingerprint, "returns": [1.0] * 3}))
    with pytest.raises(UserError, match=r"seed-0.json holds 3 episodes; give --episodes 3"):
        run([job], parallel=1, episodes=2)
    assert run([job], parallel=1, episodes=3) == []


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", '{"fingerprint": "x"}'])
def test_a_damaged_result_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    (job,) = plan(["tiny"], 1, configs=tmp_path, out=tmp_path / "out", root=tmp_path / "runs")
    job.result.parent.mkdir(parents=True)
    job.result.write_text(content)
    for read in (lambda: run([job], parallel=1, episodes=1), lambda: load_results(tmp_path / "out")):
        with pytest.raises(UserError, match=r"seed-0.json is damaged, no result of this benchmark \(.*\): delete it"):
            read()


def test_no_results_is_said_in_words(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no results"):
        load_results(tmp_path)


def test_side_by_side_at_the_same_steps_and_after_the_same_time(tmp_path: Path) -> None:
    def store(agent: str, seed: int, returns: list[float], curve: list[float], wall_s: float) -> None:
        file = tmp_path / agent / "tiny" / f"seed-{seed}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        evaluations = {"env_steps": [100, 200, 300, 400], "mean": curve}
        run = {"environment": "Tiny-v0", "env_steps": 400, "wall_s": wall_s}
        file.write_text(json.dumps({**run, "returns": returns, "evaluations": evaluations}))

    def compare() -> str:
        return side_by_side(tmp_path / "ours", tmp_path / "theirs", agent="them", speed=tmp_path / "speed.json")

    for seed, wall_s in enumerate((9.0, 10.0, 17.0)):
        store("ours", seed, [50.0, 70.0], [0, 0, 0, 0], wall_s)
    store("theirs", 0, [30.0], [1, 2, 30, 30], 15.0)
    store("theirs", 1, [50.0], [3, 4, 50, 50], 17.0)
    (tmp_path / "speed.json").write_text("[]")
    with pytest.raises(UserError, match=r"is not what benchmark\.py speed writes"):
        compare()
    (tmp_path / "speed.json").unlink()
    with pytest.raises(UserError, match=r"no rates of training.*speed --parts recipes"):
        compare()

    rows = {OUR_ROW: [40.0] * 3, "trpo, gymnasium": [90.0] * 3, "them, zoo": [20, 25, 25]}
    rounds = {row: [{"steps_per_s": rate} for rate in rates] for row, rates in rows.items()}
    (tmp_path / "speed.json").write_text(json.dumps({"tables": {"recipe Tiny-v0": rounds}}))
    # In our 10 s theirs come to 267 and 235 steps: the evaluation at 200 is their last by then.
    row = compare().splitlines()[-1]
    assert [cell.strip() for cell in row.strip("|").split("|")] == [
        *("Tiny-v0", "60.0 ± 0.0", "3", "10 s"),
        *("40.0 ± 10.0", "2", "16 s", "3.0 ± 1.0", "1.6"),
    ]
    for agent in ("ours", "theirs"):  # a task whose speed was not measured
        shutil.copytree(tmp_path / agent / "tiny", tmp_path / agent / "unmeasured")
        for file in (tmp_path / agent / "unmeasured").iterdir():
            file.write_text(file.read_text().replace("Tiny-v0", "Unmeasured-v0"))
    assert compare().splitlines()[-2] == row
    assert compare().splitlines()[-1] == row.replace("Tiny", "Unmeasured").replace("| 1.6 |", "| – |")
    shutil.rmtree(tmp_path / "theirs" / "unmeasured")
    shutil.rmtree(tmp_path / "ours" / "unmeasured")
    store("theirs", 0, [30.0], [1, 2, 30, 30], 45.0)  # 89 steps in 10 s
    assert "| 2.5 ± 1.5, its first evaluation, later |" in compare()
    store("theirs", 0, [30.0], [1, 2, 30, 30], 5.0)  # all of them, and half the time over
    assert "| 17.0 ± 13.0 |" in compare()
    (tmp_path / "theirs" / "tiny").rename(tmp_path / "theirs" / "other")
    with pytest.raises(UserError, match="no task in common"):
        compare()


CONFIGS = Path(__file__).parents[1] / "configs"


def test_another_implementations_run_has_its_own_settings_and_its_own_fingerprint(tmp_path: Path) -> None:
    def jobs(overrides: list[str], agent: str) -> list:
        tasks = ["swimmer", "half_cheetah", "hopper"]
        return plan(tasks, 1, configs=CONFIGS, out=tmp_path, root=tmp_path, overrides=overrides, agent=agent)

    algorithms = [json.loads(job.settings)["algorithm"] for job in jobs([], "sb3-contrib")]
    assert [a["gamma"] for a in algorithms] == [0.9999, 0.99, 0.99]
    assert [a.get("target_kl") for a in algorithms] == [None, 0.04, None]
    prints = {
        jobs(overrides, agent)[2].fingerprint
        for overrides, agent in [
            ([], "sb3-contrib"),
            (["natural_gradient.damping=0.2"], "sb3-contrib"),  # of ours: nothing to the other
            (["total_steps=500_000"], "sb3-contrib"),
            ([], "trpo"),
        ]
    }
    assert len(prints) == 3


def test_another_implementations_policy_is_evaluated_with_and_without_noise() -> None:
    """A model that knows nothing but the mean 0.5, of which all that is asked is here."""

    class Model:
        env = gymnasium.make("Pendulum-v1")
        observation_space, action_space = env.observation_space, env.action_space
        policy = property(lambda self: self)

        def get_vec_normalize_env(self) -> Any:
            return SimpleNamespace(normalize_obs=lambda obs: obs)

        def set_training_mode(self, training: bool) -> None:
            assert not training

        def get_distribution(self, obs: torch.Tensor) -> Any:
            half = torch.full((len(obs), 1), 0.5)
            return SimpleNamespace(distribution=torch.distributions.Normal(half, torch.ones_like(half)))

    model, config = Model(), load_config(CONFIGS / "pendulum.yaml").env
    exact, noisy = (
        evaluate(
            peer_learning.FrozenPolicy(model), config, model.action_space, episodes=1, seed=3, deterministic=exactly
        )
        for exactly in (True, False)
    )
    env, expected = Model.env, 0.0
    env.reset(seed=3)
    for _ in range(200):
        expected += float(env.step(np.array([0.5], np.float32))[1])
    assert exact.mean == expected != noisy.mean


@pytest.mark.slow
def test_another_implementation_is_trained_and_scored_on_frozen_statistics() -> None:
    """As sb3 itself would: normalised by statistics that the evaluation leaves alone, actions by `predict`."""
    pytest.importorskip("sb3_contrib")
    overrides = ["total_steps=4096", "evaluation.every_steps=2048", "evaluation.episodes=1"]
    settings = json.loads(peer_learning.settings(load_config(CONFIGS / "hopper.yaml", overrides)))
    result = peer_learning.learn(settings, 2, seed=7)
    assert len(result["returns"]) == 2 and result["env_steps"] == 4096
    assert result["evaluations"]["env_steps"] == [2048, 4096]
    assert result["wall_s"] > 0

    model = peer_learning.make_model(settings["env"]["id"], settings["algorithm"], seed=settings["seed"])
    model.learn(2048)
    obs = np.random.default_rng(0).normal(size=(5, 11))
    before = model.get_vec_normalize_env().obs_rms.mean.copy()
    mode = peer_learning.FrozenPolicy(model).mode(torch.from_numpy(obs)).numpy()
    expected, _ = model.predict(model.get_vec_normalize_env().normalize_obs(obs), deterministic=True)
    np.testing.assert_allclose(mode.clip(-1, 1), expected, atol=1e-6)  # float32
    assert (model.get_vec_normalize_env().obs_rms.mean == before).all()


def test_the_commands_of_the_readme_have_nothing_left_to_do(tmp_path: Path) -> None:
    """A new setting must not make the results that are there those of other settings."""
    root = Path(__file__).parents[1]
    commands = re.findall(
        r"^python scripts/benchmark.py (learn --(?:suite|task) .*)$", (root / "README.md").read_text(), re.M
    )
    assert len(commands) == 5
    for command in commands:
        given = shlex.split(command)
        options = dict(zip(given[1::2], given[2::2], strict=True))
        tasks = SUITES[options["--suite"]] if "--suite" in options else [options["--task"]]
        jobs = plan(
            tasks,
            int(options["--seeds"]),
            configs=root / "configs",
            out=root / "benchmarks" / "learning",
            root=tmp_path,
            overrides=[options["--set"]] if "--set" in options else [],
        )
        assert [job.result for job in jobs if not job.finished] == []
