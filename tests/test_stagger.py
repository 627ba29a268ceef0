"""Staggered starts: the lengths of episodes on every backend, Gymnasium's time limit being the oracle."""

from __future__ import annotations

import sys
from typing import Any

import fake_envpool
import numpy as np
import pytest
import torch

from trpo.config import EnvConfig
from trpo.envs import make_envs
from trpo.envs.contract import BatchEnv
from trpo.envs.stagger import NEVER, first_episode_length

SEEDS = [3, 1, 2**31 - 1]
LIMIT = 200  # of Pendulum-v1
CUTS = [first_episode_length(LIMIT, seed) for seed in SEEDS]
BACKENDS = ["gymnasium", "gymnasium-async", "torch", "envpool"]


def pendulums(backend: str, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> BatchEnv:
    monkeypatch.setitem(sys.modules, "envpool", fake_envpool)
    return make_envs(EnvConfig(id="Pendulum-v1", backend=backend, workers=1, **settings), SEEDS)


def episode_lengths(envs: BatchEnv, steps: int) -> list[list[int]]:
    """Lengths of the episodes that end in each environment; rows that are no transition do not count."""
    lengths: list[list[int]] = [[] for _ in SEEDS]
    running = [0] * len(SEEDS)
    for _ in range(steps):
        step = envs.step(torch.zeros(len(SEEDS), 1))
        for i in range(len(SEEDS)):
            running[i] += int(step.valid[i])
            if step.truncated[i]:
                lengths[i].append(running[i])
                running[i] = 0
    return lengths


def test_lengths_are_spread_over_the_time_limit() -> None:
    lengths = [first_episode_length(1000, seed) for seed in range(4000)]
    assert min(lengths) >= 1 and max(lengths) <= 1000
    # The mean of 4000 uniform numbers: 500.5 with a standard error of 289 / √4000 = 4.6; five of them.
    assert abs(np.mean(lengths) - 500.5) < 23
    assert first_episode_length(1000, 5) == lengths[5]
    assert first_episode_length(None, 5) == NEVER


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_first_episode_of_each_environment_is_cut(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    envs = pendulums(backend, monkeypatch)
    envs.reset()
    assert len(set(CUTS)) == 3
    assert [lengths[:2] for lengths in episode_lengths(envs, 450)] == [[cut, LIMIT] for cut in CUTS]
    envs.close()


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_it_all_are_in_step(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    envs = pendulums(backend, monkeypatch, stagger=False)
    envs.reset()
    assert episode_lengths(envs, 210) == [[LIMIT]] * 3
    envs.close()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cut_is_a_truncation_with_its_true_successor(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    staggered, oracle = pendulums(backend, monkeypatch), pendulums(backend, monkeypatch, stagger=False)
    assert torch.equal(staggered.reset(), oracle.reset())
    first, i = min(CUTS), int(np.argmin(CUTS))
    for _ in range(first):
        step, expected = (envs.step(torch.ones(3, 1)) for envs in (staggered, oracle))
        assert torch.equal(step.next_obs, expected.next_obs) and torch.equal(step.reward, expected.reward)
    assert step.truncated.tolist() == [n == i for n in range(3)] and not step.terminated.any()
    assert not torch.equal(step.reset_obs[i], step.next_obs[i])
    begun = step.reset_obs[i].clone()
    after = staggered.step(torch.ones(3, 1))
    assert after.valid.all()
    # The new episode went on from where it began: θ̇ of a pendulum changes by less than 1 in a step.
    assert abs(float(after.next_obs[i, 2] - begun[2])) < 1.0
    staggered.close(), oracle.close()


@pytest.mark.parametrize("backend", ["gymnasium", "torch"])
def test_a_restored_first_episode_is_still_cut(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    envs, restored = (pendulums(backend, monkeypatch) for _ in range(2))
    envs.reset()
    before = min(CUTS) // 2
    episode_lengths(envs, before)
    restored.reset()
    restored.load_state_dict(envs.state_dict())
    assert [lengths[0] for lengths in episode_lengths(restored, 450)] == [cut - before for cut in CUTS]
    envs.close(), restored.close()


@pytest.mark.parametrize("backend", ["gymnasium", "envpool"])
def test_cut_episodes_begin_with_observations_as_flat_as_all(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cut at once, of a task whose states are numbers: the first one is row e₀ of the identity."""
    monkeypatch.setitem(sys.modules, "envpool", fake_envpool)
    envs = make_envs(EnvConfig(id="FrozenLake8x8-v1", backend=backend, workers=1), [3, 3, 1])
    envs.reset()
    left = torch.zeros(3, 1, dtype=torch.int64)  # along the first column, where the ice is whole
    for _ in range(first_episode_length(200, 3)):
        step = envs.step(left)
    assert step.truncated.tolist() == [True, True, False] and not step.terminated.any()
    first = torch.eye(64)[0].expand(2, 64)
    assert torch.equal(step.reset_obs[:2].float(), first) and torch.equal(step.next_obs.sum(-1).float(), torch.ones(3))
    envs.close()
