"""The speed benchmark: its count of operations, its arithmetic on made-up rounds, its report; and, where the others are
installed, one small round of everything."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, addmm_flop

from trpo.benchmark import peers
from trpo.benchmark.floor import matmul_rate, update_flops
from trpo.benchmark.ours import _config, _defaults, _Update
from trpo.benchmark.side_by_side import OUR_ROW
from trpo.benchmark.speed import OURS, SETUPS, TASKS, Child, Extent, plan_speed, run_speed
from trpo.benchmark.speed_report import best, median_ratio, targets, write_report
from trpo.benchmark.work import CG_ITERATIONS, MAX_KL, UPDATE_ENVS, UPDATE_TASK
from trpo.config.file import load_config
from trpo.distributions import DiagonalGaussian
from trpo.errors import EnvError, UserError
from trpo.networks.mlp import MLP

TINY = Extent(rounds=1, repeats=1, steps=64, batches=(2048,), widths=(64,), envs=(16,))


def test_operations_of_an_update_by_hand() -> None:
    # W = 2·3 + 3·1 = 9, without the first layer 3. Forward: 2·10·9 = 180; a product with J: 180 + 2·10·3 = 240.
    forward, product = 180, 240
    assert update_flops([2, 3, 1], 10, cg_iterations=0, evaluations=0) == forward + product
    assert update_flops([2, 3, 1], 10, cg_iterations=15, evaluations=2) == 3 * forward + 31 * product


def test_operations_of_an_update_against_torchs_count() -> None:
    """Of the linearisation that the update is made of, run once for each product it takes."""
    sizes, batch, cg_iterations, evaluations = [11, 64, 64, 3], 32, 4, 2
    mlp = MLP(sizes, activation="tanh", head_scale=1.0, generator=torch.Generator().manual_seed(0)).double()
    x = torch.randn(batch, sizes[0], dtype=torch.float64)  # what torch can count is done in torch
    # torch counts the other forms of addmm only.
    in_place = {torch.ops.aten.addmm_: lambda out, a, b, **_: addmm_flop(out, a, b)}
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        linearization = mlp.linearize(x)
        gradient = linearization.vjp(torch.randn(batch, sizes[-1], dtype=torch.float64))
        for _ in range(cg_iterations):
            linearization.vjp(linearization.jvp(gradient))
        for _ in range(evaluations):
            mlp(x)
    counted = counter.get_total_flops()
    assert counted == update_flops(sizes, batch, cg_iterations=cg_iterations, evaluations=evaluations)


def test_matmul_rate_is_a_rate() -> None:
    assert 1e6 < matmul_rate(64, 256, repeats=2) < 1e14


def test_ratios_are_taken_within_rounds_and_failed_rounds_left_out() -> None:
    slow = [{"s": 10.0}, {"s": 40.0}, None, {"s": 9.0}]  # the second round met noise, and so did the other in it
    fast = [{"s": 5.0}, {"s": 20.0}, {"s": 1.0}, {"s": 3.0}]
    assert median_ratio(slow, fast, "s") == 2.0  # of 2, 2 and 3; the ratio of medians would be 2.5
    assert math.isnan(median_ratio(None, fast, "s")) and math.isnan(median_ratio([None], fast, "s"))


def test_the_best_row_is_of_that_contender_and_by_median() -> None:
    rows = {
        "trpo, a": [{"steps_per_s": 1.0}, {"steps_per_s": 2.0}, {"steps_per_s": 99.0}],
        "trpo, b": [{"steps_per_s": 3.0}, {"steps_per_s": 3.0}, None],
        "trpo, c": [None, None, None],
        "skrl, a": [{"steps_per_s": 50.0}],
    }
    assert best(rows, "trpo") == "trpo, b" and best(rows, "tianshou") is None


def made_up() -> dict:
    update = {"whole_s": 0.02, "policy_s": 0.01, "value_s": 0.01, "accepted": 1.0}
    variants = {"plain 50_s": 0.03, "plain 50_gain": 1.0, "preconditioned 5_s": 0.01, "preconditioned 5_gain": 1.0}
    return {
        "update": {
            "trpo": [update | variants | {"gain": 0.9}],
            "sb3-contrib": [{key: 6 * value for key, value in update.items()} | {"accepted": 1.0}],
        },
        "train Hopper-v5": {
            "trpo, gymnasium × 16": [{"steps_per_s": 8000.0, "random_steps_per_s": 10_000.0}],
            "sb3-contrib, DummyVecEnv × 16": [{"steps_per_s": 5000.0}],
        },
        "scaling": {"2048 × 64": [{"policy_s": 0.01, "value_s": 0.01, "floor_s": 0.004, "flops_per_s": 1e11}]},
        "rollout": {"16": [{"steps_per_s": 9000.0, "random_steps_per_s": 10_000.0}]},
        "memory": {"trpo": [{"peak_mib": 300.0}], "sb3-contrib": [{"peak_mib": 400.0}], "skrl": [None]},
    }


def test_targets_of_made_up_rounds() -> None:
    found = {target.what: (target.ratio, target.met) for target in targets(made_up())}
    assert found["whole update, sb3-contrib / ours"] == (pytest.approx(6), True)
    assert found["policy part, ours / floor of its matrix products"] == (pytest.approx(2.5), False)
    assert found["policy part, ours with 50 plain iterations / with 5 preconditioned"] == (pytest.approx(3), False)
    assert found["Hopper-v5: training, our best / sb3-contrib's best"] == (pytest.approx(1.6), False)
    assert found["Hopper-v5: training / random stepping, trpo, gymnasium × 16"] == (pytest.approx(0.8), True)
    assert found["peak memory, ours / sb3-contrib"] == (pytest.approx(0.75), True)
    unmeasured, met = found["peak memory, ours / skrl"]
    assert math.isnan(unmeasured) and not met


def test_report_and_plot(tmp_path: Path) -> None:
    result = {
        "command": "a command",
        "threads": 1,
        "rounds": 1,
        "versions": {"torch": "9.9"},
        "machine": {"processor": "a processor", "cores": 2},
        "tables": made_up(),
        "errors": ["skrl, memory, skrl: it broke"],
    }
    text = write_report(result, tmp_path)
    assert (tmp_path / "speed.md").read_text() == text
    assert "| whole update, sb3-contrib / ours | 6.00 | ≥ 5 | yes |" in text
    assert "| sb3-contrib | 120.0 | 60.0 | 60.0 | 6.00 | 6.00 | yes |" in text
    assert "| peak memory, ours / skrl | – | ≤ 1 | not measured |" in text
    assert "- skrl, memory, skrl: it broke" in text
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_contenders_take_turns_and_setups_without_envpool_are_left_out() -> None:
    plan = list(plan_speed(list(SETUPS), TASKS, ("update", "train"), TINY, envpool=False))
    assert [measurement.contender for measurement in plan[:8]] == 2 * list(SETUPS)
    assert not any("envpool" in measurement.row for measurement in plan)


def test_recipes_are_measured_in_tables_of_their_own_as_returns_are_compared() -> None:
    plan = list(plan_speed([OURS, "sb3-contrib", "skrl"], [], ("recipes",), TINY, envpool=True))
    assert all(measurement.request["recipe"] for measurement in plan)
    rows = {measurement.row for measurement in plan if measurement.table == "recipe Walker2d-v5"}
    assert OUR_ROW in rows and {row.partition(",")[0] for row in rows} == {OURS, "sb3-contrib"}


def test_our_recipe_is_the_defaults() -> None:
    config = _defaults("Hopper-v5", {"num_envs": 16}, threads=1)
    trained = load_config(Path(__file__).parents[1] / "configs" / "hopper.yaml")
    incidental = {"env", "total_steps", "device", "threads", "evaluation", "checkpoint"}
    assert config.model_dump(exclude=incidental) == trained.model_dump(exclude=incidental)


def test_our_work_is_that_of_everyone() -> None:
    """The bound on the joint KL, a Gaussian policy and all CG iterations, whatever the recipe."""
    updated = _Update(_config(UPDATE_TASK, {"num_envs": UPDATE_ENVS}))
    assert isinstance(updated.agent.policy.distribution, DiagonalGaussian)
    assert all(updated.agent.kl_bound(progress) == MAX_KL for progress in (0.0, 1.0))
    assert updated.measure(1, variants=False)["cg_iterations"] == CG_ITERATIONS


def test_a_failing_measurement_is_one_line_and_the_process_goes_on() -> None:
    child = Child(OURS, 1)
    try:
        broken = child.call({"call": "train", "task": "NoSuchTask-v0", "setup": {"num_envs": 1}, "steps": 1})
        assert "NoSuchTask" in broken["error"] and "\n" not in broken["error"]
        assert child.call({"call": "memory"})["numbers"]["peak_mib"] > 10
        child._process.kill()
        child._process.wait()
        assert "process" in child.call({"call": "memory"})["error"]
    finally:
        child.close()


def test_where_nothing_could_be_measured_earlier_results_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "installed", list)
    (tmp_path / "speed.json").write_text("{}")
    monkeypatch.setattr(Child, "call", lambda self, request: {"error": "out of memory"})
    with pytest.raises(UserError, match=r"nothing could be measured.*out of memory"):
        run_speed(tmp_path, extent=TINY, tasks=["Hopper-v5"], parts=("train",), say=lambda line: None)
    assert [file.name for file in tmp_path.iterdir()] == ["speed.json"]


def test_a_task_that_does_not_exist_is_an_error_before_anything_is_measured(tmp_path: Path) -> None:
    with pytest.raises(EnvError, match=r"Hoper-v5.*did you mean Hopper-v5"):
        run_speed(tmp_path / "out", extent=TINY, tasks=["Hopper-v5", "Hoper-v5"], say=pytest.fail)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.skipif(not peers.installed(), reason="none of the other implementations is installed")
def test_one_small_round_of_everyone(tmp_path: Path) -> None:
    run_speed(tmp_path, extent=TINY, tasks=["Hopper-v5"], parts=("update", "train", "recipes"), say=lambda line: None)
    result = json.loads((tmp_path / "speed.json").read_text())
    assert result["errors"] == []
    assert set(result["tables"]["update"]) == {OURS, *peers.installed()}
    for rounds in result["tables"]["update"].values():
        assert rounds[0]["accepted"] == 1 and 0 < rounds[0]["policy_s"] < rounds[0]["whole_s"]
