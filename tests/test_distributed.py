"""Two real processes with unequal shares of the data against one process with all of it.

The processes are started once, do everything, and leave their results as arrays on disk; the tests compare these.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import PROJECT, command, one_line
from helpers import F64, OBS_DIM, make_batch, make_mlp, make_policy, randn, seeded, settings
from test_earlier_rollouts import make_agent, rollout_of, update
from torch import Tensor

from trpo.advantages import standardize
from trpo.batch import Batch
from trpo.config import AdamFitConfig, GaussNewtonFitConfig
from trpo.natural_gradient import effective_dimension, trust_region_step
from trpo.normalizer import ObservationNormalizer, RewardScaler
from trpo.run.saved_policy import load_policy
from trpo.runtime.distributed import Group, join_group, leave_group
from trpo.runtime.random_streams import stream_seed
from trpo.value import AdamFit, GaussNewtonFit, ValueFunction, explained_variance

SIZE = 61
SHARES = (slice(0, 12), slice(12, SIZE))  # a mean of the two means would weigh the first rank's samples fourfold
# Sums of 61 terms taken in another order, carried through CG on systems of condition below 1e3.
TOLERANCE = {"rtol": 1e-10, "atol": 1e-12}
# Of this tree: the package, which may be installed from another one too, and the tests.
HERE = os.pathsep.join([str(PROJECT), str(Path(__file__).parent)])

Arrays = dict[str, np.ndarray]


def scenario(group: Group, share: slice) -> Arrays:
    """Everything that reduces over processes, on this process's share of the same data."""
    out: dict[str, Tensor | float | str] = {}
    policy = make_policy()
    whole = make_batch(policy, size=SIZE)
    advantage = standardize(5 + 3 * whole.advantage[share], group.all_sum)
    batch = Batch(whole.obs[share], whole.action[share], advantage)
    report = trust_region_step(policy, batch, max_kl=0.01, settings=settings(), all_sum=group.all_sum)
    out |= {"advantage": advantage, "policy": policy.theta.vector, "policy_outcome": str(report.outcome)}
    out |= {name: getattr(report, name) for name in ("gradient_norm", "gain", "kl", "scale", "expected_gain")}

    target = whole.obs.sum(1).sin()[share]
    for name, make_fit in FITS.items():
        value = ValueFunction(make_mlp([OBS_DIM, 5, 4, 1]))
        fit = make_fit(value, group).fit(value, batch.obs, target, progress=0.0)
        out |= {name: value.theta.vector, f"{name}_loss": fit.loss_after}
        prediction = value(batch.obs).detach()
        out[f"{name}_explained"] = explained_variance(prediction, target, group.all_sum)

    normalizer = ObservationNormalizer(OBS_DIM, clip=10.0, dtype=F64)
    for offset in (0.0, 3.0):
        normalizer.update(batch.obs + offset, all_sum=group.all_sum)
    out |= {"mean": normalizer.moments.mean, "m2": normalizer.moments.m2, "seen": normalizer.moments.count}

    envs = slice(0, 1) if share == SHARES[0] else slice(1, 4)
    reward = randn(20, 4)[:, envs if group.size > 1 else slice(None)]
    none = torch.zeros_like(reward, dtype=torch.bool)
    scaler = RewardScaler(reward.shape[1], gamma=0.9, clip=10.0)
    scaler.update(reward, none, ~none, all_sum=group.all_sum)
    out["reward_variance"] = scaler.moments.variance

    thinned = make_policy()
    thin = trust_region_step(
        thinned,
        batch,
        max_kl=1e-4,
        settings=settings(fisher_subsample=0.5),
        all_sum=group.all_sum,
        generator=seeded(20 + group.rank),
    )
    out |= {"thinned": thinned.theta.vector, "thinned_gradient_norm": thin.gradient_norm}

    signs = seeded(9)
    torch.randint(2, (share.start or 0, 1), generator=signs)  # those of the samples before
    out["dimension"] = effective_dimension(
        policy, batch, damping=0.1, cg_iterations=200, cg_tolerance=1e-13, all_sum=group.all_sum, generator=signs
    )

    agent = make_agent(1, group=group)
    for seed in (2, 4):
        reused = update(agent, rollout_of(agent, seed + group.rank))
    out |= {"weight": reused.batch.weight, "effective_share": reused.effective_share}
    out |= bad_data(group, batch, target)
    return {name: np.asarray(x.detach().clone() if isinstance(x, Tensor) else x) for name, x in out.items()}


def minibatch_fit(size: int, value: ValueFunction, group: Group) -> AdamFit:
    return AdamFit(
        AdamFitConfig(epochs=2, minibatch_size=size),
        value,
        generator=seeded(3 + group.rank),
        learning_rate=lambda progress: 0.01,
        all_sum=group.all_sum,
    )


FITS: dict[str, Callable[[ValueFunction, Group], GaussNewtonFit | AdamFit]] = {
    "gauss_newton": lambda value, group: GaussNewtonFit(
        GaussNewtonFitConfig(iterations=2, cg_iterations=50), all_sum=group.all_sum
    ),
    # One minibatch of everything: smaller ones hold other samples on two processes than on one.
    "adam": lambda value, group: AdamFit(
        AdamFitConfig(epochs=3, minibatch_size=SIZE),
        value,
        generator=seeded(3),
        learning_rate=lambda progress: 0.01,
        all_sum=group.all_sum,
    ),
    # Minibatches: the ranks' shares are of different sizes, their numbers of steps must not be.
    "adam_minibatches": lambda value, group: minibatch_fit(8, value, group),
    # As many minibatches as samples: some have none on one rank, some on neither.
    "adam_single_samples": lambda value, group: minibatch_fit(1, value, group),
}


def bad_data(group: Group, batch: Batch, target: Tensor) -> dict[str, Tensor | str | float]:
    """A NaN that only rank 0 holds: every process has to refuse, and to leave what it has as it was."""
    spoilt = torch.full_like(target, 0.0)
    if group.rank == 0:
        spoilt[0] = torch.nan
    policy = make_policy()
    before = policy.theta.vector.clone()
    report = trust_region_step(
        policy,
        replace(batch, advantage=batch.advantage + spoilt),
        max_kl=0.01,
        settings=settings(),
        all_sum=group.all_sum,
    )
    out: dict[str, Tensor | str | float] = {
        "nan_outcome": str(report.outcome),
        "nan_policy_moved": float(not torch.equal(policy.theta.vector, before)),
        "nan_advantage": standardize(batch.advantage + spoilt, group.all_sum),
    }
    for name, make_fit in FITS.items():
        value = ValueFunction(make_mlp([OBS_DIM, 5, 4, 1]))
        before = value.theta.vector.clone()
        fit = make_fit(value, group).fit(value, batch.obs, target + spoilt, progress=0.0)
        out[f"nan_{name}"] = float(fit.refused > 0 and torch.equal(value.theta.vector, before))
    return out


def communication(group: Group) -> Arrays:
    """What a group itself promises."""
    everyone = group.gather_objects({"rank": group.rank})
    told = group.broadcast(f"from {group.rank}")
    agreed, differs = torch.ones(3), torch.full((3,), float(group.rank))
    group.assert_equal(agreed, "it")
    try:
        group.assert_equal(differs, "θ")
        complaint = ""
    except RuntimeError as error:
        complaint = str(error)
    shared = group.all_sum(torch.tensor([1.0, float(group.rank)], dtype=F64))
    slices = [Group(rank, 3).shard(7) for rank in range(3)]
    return {
        "ranks": np.asarray([each["rank"] for each in everyone]),
        "told": np.asarray(told),
        "complaint": np.asarray(complaint),
        "shared": shared.numpy(),
        "slices": np.asarray([(s.start, s.stop) for s in slices]),
    }


def main(out: str) -> None:
    """One of the processes."""
    torch.set_num_threads(1)
    group = join_group(torch.device("cpu"))
    try:
        arrays = scenario(group, SHARES[group.rank]) | communication(group)
        np.savez(f"{out}/rank{group.rank}.npz", **arrays)
    finally:
        leave_group(group)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def in_two_processes(arguments: list[str], *, status: int = 0, **environment: str) -> list[str]:
    """Runs a command as both of two processes, as `torchrun` would, to this exit status; what they print, or complain
    of."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            arguments,
            env=os.environ | environment | address | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    printed = []
    try:
        for process in processes:
            out, errors = process.communicate(timeout=180)
            assert process.returncode == status, errors
            # Some releases of torch tell of their connections.
            printed.append(re.sub(r"(?m)^\[Gloo\].*\n", "", errors if status else out))
    finally:
        for process in processes:
            process.kill()
    return printed


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Arrays]:
    """What the two processes left; a deadlock shows as a timeout."""
    out = tmp_path_factory.mktemp("ranks")
    in_two_processes([sys.executable, str(Path(__file__)), str(out)])
    results = []
    for rank in range(2):
        with np.load(out / f"rank{rank}.npz") as arrays:
            results.append(dict(arrays))
    return results


@pytest.fixture(scope="module")
def single() -> Arrays:
    """The same scenario in this process alone."""
    return scenario(Group(), slice(None)) | communication(Group())


def same_on_both(ranks: list[Arrays], name: str) -> np.ndarray:
    """The value of a name, after a check that it has the same bits on both ranks."""
    first, second = ranks[0][name], ranks[1][name]
    assert first.tobytes() == second.tobytes()
    return first


@pytest.mark.parametrize("name", ["gradient_norm", "policy", "gain", "kl", "scale", "expected_gain"])
def test_the_trust_region_step_is_that_of_one_process(ranks: list[Arrays], single: Arrays, name: str) -> None:
    assert str(same_on_both(ranks, "policy_outcome")) == str(single["policy_outcome"]) == "accepted"
    np.testing.assert_allclose(same_on_both(ranks, name), single[name], **TOLERANCE)


@pytest.mark.parametrize("name", ["gauss_newton", "adam"])
def test_the_value_fits_are_those_of_one_process(ranks: list[Arrays], single: Arrays, name: str) -> None:
    for part in (name, f"{name}_loss", f"{name}_explained"):
        np.testing.assert_allclose(same_on_both(ranks, part), single[part], rtol=1e-8, atol=1e-10)  # CG stops at 1e-8


def test_minibatches_of_unequal_shares_keep_the_ranks_together(ranks: list[Arrays], single: Arrays) -> None:
    same_on_both(ranks, "adam_minibatches")
    # Other minibatches, so another path, but to the same end: within a tenth of the loss.
    loss = float(same_on_both(ranks, "adam_minibatches_loss"))
    assert loss == pytest.approx(float(single["adam_minibatches_loss"]), rel=0.1)


def test_minibatches_without_a_sample_are_no_step(ranks: list[Arrays]) -> None:
    same_on_both(ranks, "adam_single_samples")
    assert np.isfinite(same_on_both(ranks, "adam_single_samples_loss"))


def test_advantages_are_standardised_over_both_processes(ranks: list[Arrays], single: Arrays) -> None:
    joined = np.concatenate([rank["advantage"] for rank in ranks])
    np.testing.assert_allclose(joined, single["advantage"], rtol=1e-13, atol=1e-13)
    assert abs(joined.mean()) < 1e-13 and joined.std() == pytest.approx(1, rel=1e-13)
    assert abs(ranks[0]["advantage"].mean()) > 0.01  # not each process for itself


@pytest.mark.parametrize("name", ["mean", "m2", "seen", "reward_variance"])
def test_normalisers_hold_the_moments_of_both_processes(ranks: list[Arrays], single: Arrays, name: str) -> None:
    np.testing.assert_allclose(same_on_both(ranks, name), single[name], rtol=1e-12, atol=1e-13)


def test_a_subsampled_fisher_matrix_is_the_same_on_both(ranks: list[Arrays], single: Arrays) -> None:
    same_on_both(ranks, "thinned")
    np.testing.assert_allclose(same_on_both(ranks, "thinned_gradient_norm"), single["gradient_norm"], rtol=1e-12)


def test_the_effective_dimension_is_that_of_one_process(ranks: list[Arrays], single: Arrays) -> None:
    np.testing.assert_allclose(same_on_both(ranks, "dimension"), single["dimension"], **TOLERANCE)


def test_the_effective_share_is_that_of_the_weights_of_both(ranks: list[Arrays]) -> None:
    """(Σw)²/(B Σw²) of Kish (1965)."""
    kish = [float(w.sum() ** 2 / (len(w) * np.square(w).sum())) for w in (rank["weight"] for rank in ranks)]
    weights = np.concatenate([rank["weight"] for rank in ranks])
    expected = weights.sum() ** 2 / (len(weights) * np.square(weights).sum())
    assert float(same_on_both(ranks, "effective_share")) == pytest.approx(expected, rel=1e-12)
    assert all(abs(each - expected) > 1e-6 for each in kish)  # not each process for itself


def test_a_nan_on_one_process_stops_both_and_moves_neither(ranks: list[Arrays]) -> None:
    assert str(same_on_both(ranks, "nan_outcome")) == "non-finite gradient"
    assert float(same_on_both(ranks, "nan_policy_moved")) == 0
    for fit in FITS:
        assert float(same_on_both(ranks, f"nan_{fit}")) == 1
    for rank in ranks:
        assert np.isnan(rank["nan_advantage"]).all()


def test_a_group_gathers_broadcasts_sums_and_compares(ranks: list[Arrays], single: Arrays) -> None:
    assert same_on_both(ranks, "ranks").tolist() == [0, 1] and single["ranks"].tolist() == [0]
    assert str(same_on_both(ranks, "told")) == str(single["told"]) == "from 0"
    assert same_on_both(ranks, "shared").tolist() == [2, 1] and single["shared"].tolist() == [1, 0]
    assert str(same_on_both(ranks, "complaint")).startswith("θ differs between processes") and not str(
        single["complaint"]
    )


def test_shares_are_contiguous_complete_and_even(single: Arrays) -> None:
    assert single["slices"].tolist() == [[0, 3], [3, 5], [5, 7]]


def test_a_run_of_two_processes_resumes_though_the_environments_of_one_cannot_and_another_starts_from_it(
    tmp_path: Path,
) -> None:
    """The last of four environments, the second process's second, draws its own random numbers."""
    kwargs = json.dumps({"only": stream_seed(0, "environments", 3), "marker": "unused"})
    given = ["env.num_envs=4", f"env.kwargs={kwargs}", "batch_size=32", "device=cpu", "evaluation.final_episodes=1"]
    changes = [word for setting in given for word in ("--set", setting)]

    def train(*arguments: object) -> list[str]:
        return in_two_processes(command("train.py", "--root", tmp_path, *arguments), PYTHONPATH=HERE)

    train("--env", "faulty_envs:OwnRandomness-v0", *changes, "--set", "total_steps=64")
    (run,) = (tmp_path / "faulty_envs-OwnRandomness-v0").iterdir()
    before = load_policy(run).policy.theta.vector
    leader, other = train("--resume", run, "--set", "total_steps=128")
    said = "process 1: warning: environment 1 did not come back to its recorded observation"
    assert said in (run / "log.txt").read_text() and said in leader and other == ""
    assert load_policy(run).info["env_steps"] == 128 and not torch.equal(load_policy(run).policy.theta.vector, before)
    next_run = ("--set", "total_steps=64", "--name", "next", "--resume", "auto", "--from", run)
    leader, other = train("--env", "faulty_envs:OwnRandomness-v0", *changes, *next_run)
    assert leader.startswith("no run of faulty_envs:OwnRandomness-v0, name next, seed 0 to go on with") and other == ""
    assert f"starts from {run / 'final'}" in leader


@pytest.mark.parametrize("told", [0, 1])
def test_a_signal_to_one_process_in_the_last_update_stops_both_with_all_of_it_saved(told: int, tmp_path: Path) -> None:
    """Whichever was told, both take the same way out: the other used to wait for a checkpoint more."""
    program = tmp_path / "stopped.py"
    program.write_text(
        f"""
import os, signal, sys
from commands import config_for
from trpo import Trainer

def stop(trainer, report):
    if trainer.updates == 2 and trainer.group.rank == {told}:
        os.kill(os.getpid(), signal.SIGTERM)

config = config_for("CartPole-v1", env={{"id": "CartPole-v1", "num_envs": 2}}, total_steps=64, batch_size=32)
result = Trainer(config, root={str(tmp_path)!r}, console=False, on_update=stop).train()
print(result.exit_status, result.env_steps)
"""
    )
    printed = in_two_processes([sys.executable, str(program)], PYTHONPATH=HERE)
    assert [lines.split("\n")[-2] for lines in printed] == ["143 64", "143 64"]


def test_where_one_process_fails_the_other_says_so_in_one_line(tmp_path: Path) -> None:
    kwargs = json.dumps({"fault": "raise", "seed": stream_seed(0, "environments", 1), "at": 40})
    given = ["env.num_envs=2", f"env.kwargs={kwargs}", "batch_size=32", "device=cpu"]
    arguments = [word for setting in given for word in ("--set", setting)]
    train = command("train.py", "--root", tmp_path, "--env", "faulty_envs:Faulty-v0", *arguments)
    leader, other = in_two_processes(train, status=2, PYTHONPATH=HERE)
    assert "raised ZeroDivisionError: pole at zero" in one_line(other)
    assert one_line(leader).startswith(
        "error: another process of this run has ended or hangs; what it said tells why ("
    )


def test_without_a_launcher_the_group_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    group = join_group(torch.device("cpu"))
    assert (group.rank, group.size, group.leads) == (0, 1, True)
    leave_group(group)


if __name__ == "__main__":
    main(sys.argv[1])
