"""The learning benchmark: statistics by hand, and a real run that is interrupted, restarted and extended."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from trpo.benchmark import load_results, plan, run, write_tables
from trpo.errors import UserError
from trpo.seed_statistics import interquartile_mean

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
    summary = write_tables(out, command="a command")
    assert "a command" in summary and (out / "summary.md").read_text() == summary
    with (out / "scores.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [float(row["mean"]) for row in rows] == [np.mean(json.loads(first.read_text())["returns"]), rows_mean(out)]


def rows_mean(out: Path) -> float:
    return float(np.mean(json.loads((out / "tiny" / "seed-1.json").read_text())["returns"]))


def test_a_run_of_other_settings_does_not_count_as_finished(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    job, other = (
        plan(["tiny"], 1, configs=tmp_path, out=tmp_path / "out", root=tmp_path / "runs", overrides=overrides)[0]
        for overrides in ([], ["gae.gamma=0.5"])
    )
    job.result.parent.mkdir(parents=True)
    job.result.write_text(json.dumps({"fingerprint": job.fingerprint}))
    assert job.finished and not other.finished


def test_no_results_is_said_in_words(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no results"):
        load_results(tmp_path)
