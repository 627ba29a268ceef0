"""The sixteen defects found in other implementations of TRPO, and the tests that keep each of them out of this one.

Here are those whose proof needs several parts together; the others stand with the part they are about, in `INDEX`.
"""

from __future__ import annotations

import ast
import csv
import dataclasses
from collections.abc import Callable
from pathlib import Path

import gymnasium
import pytest
import torch
from helpers import F64, OBS_DIM, make_batch, make_mlp, make_policy, randn, settings, torch_kl

from trpo import agent as agent_module
from trpo.advantages import standardize
from trpo.collector import Collector
from trpo.config import Config
from trpo.config.file import load_config
from trpo.distributions import DiagonalGaussian
from trpo.envs.vector import VectorEnvAdapter
from trpo.errors import UserError
from trpo.natural_gradient import Outcome, StepReport, trust_region_step
from trpo.networks.gaussian_heads import GaussianHead
from trpo.normalizer import ObservationNormalizer
from trpo.policy import Policy
from trpo.trainer import Trainer

# defect: (what went wrong elsewhere, the tests against it)
INDEX: dict[int, tuple[str, tuple[str, ...]]] = {
    1: (
        "KL averaged over action dimensions",
        ("test_defects.py::test_the_bound_holds_for_the_joint_kl_of_many_action_dimensions",),
    ),
    2: ("KL(new‖old) for KL(old‖new)", ("test_defects.py::test_the_kl_is_from_the_old_policy_to_the_new",)),
    3: (
        "direction and residual of CG share memory",
        ("test_conjugate_gradient.py::test_direction_and_residual_do_not_share_memory",),
    ),
    4: (
        "expected improvement compounded over backtracks",
        ("test_line_search.py::test_the_expected_gain_shrinks_with_the_step_and_does_not_compound",),
    ),
    5: (
        "advantages divided by the variance",
        ("test_defects.py::test_advantages_are_divided_by_their_standard_deviation",),
    ),
    6: (
        "a subsample that thins gradient and line search",
        ("test_natural_gradient.py::test_the_subsample_thins_the_fisher_matrix_only",),
    ),
    7: (
        "a rejected candidate left in place or logged as accepted",
        (
            "test_natural_gradient.py::test_an_exhausted_search_says_what_was_wrong",
            "test_natural_gradient.py::test_an_overflowing_step_without_search_is_never_left_in_place",
            "test_defects.py::test_a_refused_update_is_logged_as_refused",
        ),
    ),
    8: (
        "the line search's result discarded",
        ("test_natural_gradient.py::test_the_search_shortens_the_full_step_and_its_result_is_what_moves_theta",),
    ),
    9: (
        "normaliser moved between rollout and update",
        (
            "test_defects.py::test_the_ratio_is_one_in_every_update_of_a_run",
            "test_collector.py::test_changed_actions_show_a_normaliser_or_policy_that_moved",
        ),
    ),
    10: (
        "time limits treated as ends; V(s) used for V(s′)",
        (
            "test_advantages.py::test_both_ends_cut_the_sum_but_only_termination_ends_the_world",
            "test_collector.py::test_every_number_is_where_and_when_it_belongs",
        ),
    ),
    11: (
        "a reset row taken for a transition",
        (
            "test_collector.py::test_a_reset_row_is_marked_and_no_transition",
            "test_advantages.py::test_a_reset_row_has_no_advantage_whatever_it_holds",
            "test_envs.py::test_rows_after_an_end_are_resets_in_next_step_mode",
            "test_defects.py::test_a_backend_that_resets_in_the_next_step_trains_on_transitions_alone",
        ),
    ),
    12: (
        "processes deciding for themselves; means of means",
        (
            "test_distributed.py::test_a_nan_on_one_process_stops_both_and_moves_neither",
            "test_distributed.py::test_the_trust_region_step_is_that_of_one_process",
            "test_distributed.py::test_advantages_are_standardised_over_both_processes",
        ),
    ),
    13: (
        "metrics written before the update they describe",
        ("test_defects.py::test_each_row_of_metrics_describes_its_own_update",),
    ),
    14: ("YAML that means something else", ("test_defects.py::test_yaml_says_what_it_looks_like",)),
    15: ("value gradients reaching the policy", ("test_value.py::test_no_fit_touches_the_policy",)),
    16: (
        "NaN out of equal advantages",
        (
            "test_defects.py::test_equal_advantages_are_no_update_and_no_nan",
            "test_natural_gradient.py::test_equal_advantages_of_zero_end_with_zero_gradient",
        ),
    ),
}


def test_every_defect_has_a_test_that_exists() -> None:
    assert list(INDEX) == list(range(1, 17))
    here = Path(__file__).parent
    for _, tests in INDEX.values():
        for reference in tests:
            file, _, name = reference.partition("::")
            tree = ast.parse((here / file).read_text(encoding="utf-8"))
            assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, reference


def wide_policy(action_dim: int) -> Policy:
    head = GaussianHead(make_mlp([OBS_DIM, 8, action_dim]), action_dim, initial_std=0.5, std_bounds=(0.01, 10.0)).to(
        F64
    )
    return Policy(head, DiagonalGaussian(action_dim), ObservationNormalizer(OBS_DIM, clip=10.0, dtype=F64))


def test_the_bound_holds_for_the_joint_kl_of_many_action_dimensions() -> None:
    policy = wide_policy(action_dim=10)
    batch = make_batch(policy, size=200)
    old = policy(batch.obs).detach()
    report = trust_region_step(policy, batch, max_kl=0.01, settings=settings())
    joint = float(torch_kl(policy.distribution, old, policy(batch.obs).detach()).mean())
    assert report.accepted
    # A mean over the dimensions would let the joint KL be 0.1; a bound on the joint one is used up to a good part.
    assert 0.005 < joint <= 0.01 * (1 + 1e-12)
    assert report.kl == pytest.approx(joint, rel=1e-9)


def test_the_kl_is_from_the_old_policy_to_the_new() -> None:
    policy = make_policy("gaussian_state_std")
    batch = make_batch(policy)
    old = policy(batch.obs).detach()
    report = trust_region_step(policy, batch, max_kl=0.1, settings=settings())
    new = policy(batch.obs).detach()
    forward, backward = (float(torch_kl(policy.distribution, *pair).mean()) for pair in ((old, new), (new, old)))
    assert abs(backward / forward - 1) > 0.01  # the two can be told apart here
    assert report.kl == pytest.approx(forward, rel=1e-9)


@pytest.mark.parametrize("scale", [1e-3, 0.1, 10.0, 1e3])
def test_advantages_are_divided_by_their_standard_deviation(scale: float) -> None:
    out = standardize(7 + scale * randn(500))
    # Two-pass moments in float64; the mean of 7 costs digits of a spread of 1e-3.
    assert float(out.mean()) == pytest.approx(0, abs=1e-10)
    assert float(out.std(correction=0)) == pytest.approx(1, rel=1e-10)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -1e12, 1e-300])
def test_equal_advantages_are_no_update_and_no_nan(value: float) -> None:
    policy = make_policy()
    batch = make_batch(policy)
    advantage = standardize(torch.full((40,), value, dtype=F64))
    assert (advantage == 0).all()
    theta = policy.theta.vector.clone()
    report = trust_region_step(
        policy, dataclasses.replace(batch, advantage=advantage), max_kl=0.01, settings=settings()
    )
    assert report.outcome is Outcome.ZERO_GRADIENT and torch.equal(policy.theta.vector, theta)


def test_yaml_says_what_it_looks_like(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("env: {id: Any-v0}\nnatural_gradient: {damping: 1e-3}\nname: on\n", encoding="utf-8")
    config = load_config(file)
    assert config.natural_gradient.damping == 0.001 and config.name == "on"


# ------------------------------------------------------------------ whole runs, on the smallest of tasks


def tiny_config(**changes: object) -> Config:
    return Config.model_validate(
        {
            "env": {"id": "CartPole-v1", "num_envs": 2, "backend": "gymnasium"},
            "total_steps": 192,
            "batch_size": 64,
            "device": "cpu",
            "dtype": "float64",
            "policy": {"hidden_sizes": [8]},
            "value": {"hidden_sizes": [8]},
            "evaluation": {"every_steps": 0, "final_episodes": 1},
            **changes,
        }
    )


def run(
    config: Config, root: Path, monkeypatch: pytest.MonkeyPatch, observe: Callable[..., None] = lambda *_: None
) -> tuple[list[StepReport], list[dict[str, str]]]:
    """Trains; the reports of all updates as they were made, and the rows of metrics as they were written."""
    reports: list[StepReport] = []

    def spy(policy: Policy, batch: object, **options: object) -> StepReport:
        observe(policy, batch)
        reports.append(trust_region_step(policy, batch, **options))
        return reports[-1]

    monkeypatch.setattr(agent_module, "trust_region_step", spy)
    result = Trainer(config, root=root, console=False).train()
    with (result.directory / "progress.csv").open(encoding="utf-8", newline="") as file:
        return reports, list(csv.DictReader(file))


def test_each_row_of_metrics_describes_its_own_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reports, rows = run(tiny_config(), tmp_path, monkeypatch)
    assert len(reports) == len(rows) == 3
    for i, (report, row) in enumerate(zip(reports, rows, strict=True), start=1):
        assert (int(float(row["train/n_updates"])), int(float(row["time/total_timesteps"]))) == (i, 64 * i)
        assert float(row["train/kl_divergence_loss"]) == pytest.approx(report.kl, rel=1e-6)  # as the file prints it
        assert float(row["train/policy_objective"]) == pytest.approx(report.gain, rel=1e-6)
        assert float(row["trust_region/gradient_norm"]) == pytest.approx(report.gradient_norm, rel=1e-6)
    assert len({report.kl for report in reports}) == 3


def test_a_refused_update_is_logged_as_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A bound so wide that its full step is not finite, and no shorter one is tried.
    wide = {"natural_gradient": {"max_kl": 1e308, "line_search": {"backtracks": 0}}}
    reports, rows = run(tiny_config(**wide), tmp_path, monkeypatch)
    assert [report.outcome for report in reports] == [Outcome.NO_CANDIDATE] * 3
    for i, row in enumerate(rows, start=1):
        assert float(row["train/is_line_search_success"]) == 0
        assert float(row["trust_region/skipped_updates"]) == i
        assert row["train/kl_divergence_loss"] in ("", "nan")  # no number that could be taken for a step's


def test_the_ratio_is_one_in_every_update_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the policy does at update time with the stored noise is what it did in the rollout, update by update."""
    changed: list[float] = []
    collect = Collector.collect

    def collect_and_keep(self: Collector) -> object:
        kept.append(self)
        out = collect(self)
        kept.append(out[0])
        return out

    kept: list[object] = []
    monkeypatch.setattr(Collector, "collect", collect_and_keep)

    def observe(policy: Policy, batch: object) -> None:
        collector, rollout = kept[-2:]
        changed.append(collector.changed_actions(rollout))
        obs = policy.normalizer(rollout.obs.flatten(0, 1))
        assert torch.equal(batch.obs, obs)

    pendulum = {"env": {"id": "Pendulum-v1", "num_envs": 2, "backend": "gymnasium"}}
    reports, _ = run(tiny_config(**pendulum), tmp_path, monkeypatch, observe)
    assert len(reports) == 3 and changed == [0.0] * 3


def test_the_run_would_notice_a_policy_that_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    collect = Collector.collect

    def collect_and_move(self: Collector) -> object:
        out = collect(self)
        self.policy.normalizer.update(5 + randn(10, out[0].obs.shape[-1], seed=3))
        return out

    monkeypatch.setattr(Collector, "collect", collect_and_move)
    pendulum = {"env": {"id": "Pendulum-v1", "num_envs": 2, "backend": "gymnasium"}}
    with pytest.raises(RuntimeError, match="the policy moved between rollout and update"):
        Trainer(tiny_config(**pendulum), root=tmp_path, console=False).train()


def test_a_backend_that_resets_in_the_next_step_trains_on_transitions_alone(tmp_path: Path) -> None:
    """Defect 11, end to end: the rows that are resets are in no count and no batch."""
    config = tiny_config(env={"id": "CartPole-v1", "num_envs": 4})
    vector_env = gymnasium.vector.SyncVectorEnv([lambda: gymnasium.make("CartPole-v1")] * 4)
    trainer = Trainer(config, root=tmp_path, console=False, env=VectorEnvAdapter(vector_env, seed=3))
    collect, seen = trainer.collector.collect, []

    def collect_and_count() -> object:
        rollout, episodes = collect()
        seen.append((int(rollout.valid.sum()), rollout.valid.numel()))
        return rollout, episodes

    trainer.collector.collect = collect_and_count
    result = trainer.train()
    transitions, rows = (sum(column) for column in zip(*seen, strict=True))
    assert result.env_steps == transitions < rows


def test_environments_made_by_hand_have_to_be_as_many_as_configured(tmp_path: Path) -> None:
    vector_env = gymnasium.vector.SyncVectorEnv([lambda: gymnasium.make("CartPole-v1")] * 2)
    with pytest.raises(UserError, match="2 environments were given"):
        Trainer(tiny_config(env={"id": "CartPole-v1", "num_envs": 4}), root=tmp_path, env=VectorEnvAdapter(vector_env))
