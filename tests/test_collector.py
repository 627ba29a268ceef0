"""The collector over environments whose every number says where and when it comes from."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from gymnasium import spaces
from helpers import F64, OBS_DIM, make_policy, randn, seeded
from torch import Tensor

from trpo.collector import Collector, Episodes
from trpo.colored_noise import ColoredNoise
from trpo.envs.contract import Step
from trpo.policy import Policy

LENGTHS = (3, 5)  # episodes of even environments last 3 and 5 steps in turn, of odd ones 5 and 3


class CounterEnvs:
    """obs = (environment, episode, step within it) and reward = 100·environment + 10·episode + step.

    Even episodes terminate, odd ones are truncated. Every second environment reports success. All tensors of a `Step`
    are buffers that the next step overwrites, as the contract allows.

    Args:
        first: global index of the first environment.
        reset_rows: the step after an episode's end is a reset and no transition.
    """

    device = torch.device("cpu")
    single_observation_space = spaces.Box(-math.inf, math.inf, (OBS_DIM,))
    single_action_space = spaces.Box(-1, 1, (2,))
    exact_resume = True

    def __init__(self, num_envs: int, *, first: int = 0, reset_rows: bool = False):
        self.num_envs = num_envs
        self.first = first
        self.reset_rows = reset_rows
        self.actions: list[Tensor] = []
        self.finished: list[tuple[float, int]] = []

    def reset(self) -> Tensor:
        self.state = torch.zeros(self.num_envs, OBS_DIM, dtype=F64)
        self.state[:, 0] = torch.arange(self.first, self.first + self.num_envs)
        self.pending = torch.zeros(self.num_envs, dtype=torch.bool)
        self.totals = [0.0] * self.num_envs
        self.next_obs, self.reset_obs = torch.zeros_like(self.state), torch.zeros_like(self.state)
        self.reward = torch.zeros(self.num_envs, dtype=F64)
        self.flags = torch.zeros(3, self.num_envs, dtype=torch.bool)
        self.success = torch.zeros(self.num_envs, dtype=F64)
        return self.state

    def step(self, action: Tensor) -> Step:
        self.actions.append(action.clone())
        terminated, truncated, valid = self.flags
        self.success.fill_(math.nan)
        for i in range(self.num_envs):
            env, episode, step = (int(x) for x in self.state[i])
            valid[i] = not self.pending[i]
            terminated[i] = truncated[i] = False
            self.reward[i] = 0.0
            if self.pending[i]:
                self.pending[i] = False
            else:
                self.reward[i] = 100 * env + 10 * episode + step
                self.totals[i] += float(self.reward[i])
                self.state[i, 2] += 1
            self.next_obs[i] = self.state[i]
            if int(self.state[i, 2]) == LENGTHS[(env + episode) % 2]:
                (truncated if episode % 2 else terminated)[i] = True
                self.finished.append((self.totals[i], int(self.state[i, 2])))
                self.totals[i] = 0.0
                self.state[i, 1:] = torch.tensor([episode + 1, 0])
                self.pending[i] = self.reset_rows
                if env % 2:
                    self.success[i] = float(episode % 2 == 0)
            self.reset_obs[i] = self.next_obs[i] if self.pending[i] else self.state[i]
        return Step(self.next_obs, self.reset_obs, self.reward, terminated, truncated, valid, self.success)

    def state_dict(self) -> dict[str, Any]:
        return {"state": self.state.clone(), "pending": self.pending.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> Tensor:
        self.reset()
        self.state.copy_(state["state"])
        self.pending.copy_(state["pending"])
        return self.state

    def close(self) -> None:
        pass


def collector(env: CounterEnvs, *, length: int = 8, policy: Policy | None = None, **options: Any) -> Collector:
    return Collector(env, policy or make_policy(), length, generator=seeded(11), **options)


def test_every_number_is_where_and_when_it_belongs() -> None:
    env = CounterEnvs(3)
    rollout, _ = collector(env).collect()
    for n in range(3):
        episode = step = 0
        for t in range(8):
            last = step + 1 == LENGTHS[(n + episode) % 2]
            assert rollout.obs[t, n].tolist() == [n, episode, step]
            assert rollout.next_obs[t, n].tolist() == [n, episode, step + 1]  # the true successor, also at an end
            assert float(rollout.reward[t, n]) == 100 * n + 10 * episode + step
            assert bool(rollout.terminated[t, n]) is (last and episode % 2 == 0)
            assert bool(rollout.truncated[t, n]) is (last and episode % 2 == 1)
            assert bool(rollout.valid[t, n])
            episode, step = (episode + 1, 0) if last else (episode, step + 1)


@torch.no_grad()
def test_actions_are_the_policys_for_the_stored_observations_and_what_the_environment_got() -> None:
    env, policy = CounterEnvs(3), make_policy()
    policy.normalizer.update(100 * randn(50, OBS_DIM))
    source = collector(env, policy=policy)
    rollout, _ = source.collect()
    noise = policy.distribution.noise(8, 3, like=policy.theta.vector, generator=seeded(11))
    for t in range(8):
        expected = policy.distribution.sample(policy(policy.normalizer(rollout.obs[t])), noise[t])
        assert torch.equal(rollout.action[t], expected)
        assert torch.equal(env.actions[t], rollout.action[t])


@pytest.mark.parametrize("kind", ["gaussian", "ordinal", "categorical", "bernoulli"])
def test_noise_is_colored(kind: str) -> None:
    policy = make_policy(kind)
    source = collector(CounterEnvs(3), policy=policy, noise_exponent=1.0)
    source.collect()
    white = policy.distribution.noise(8, 3, like=policy.theta.vector, generator=seeded(11))
    assert torch.equal(source.noise, ColoredNoise(8, 1.0, like=white)(white))


def test_rollouts_continue_where_the_last_one_ended_in_the_same_memory() -> None:
    source = collector(CounterEnvs(2), length=4)
    first, _ = source.collect()
    ends, memory = first.next_obs[-1].clone(), first.obs.data_ptr()
    second, _ = source.collect()
    assert second.obs.data_ptr() == memory
    assert torch.equal(second.obs[0, 1], ends[1])  # environment 1 was within an episode of 5
    assert second.obs[0, 0].tolist() == [0, 1, 1]  # environment 0 ended its first episode at step 3
    assert not second.action.is_inference() and not second.action.requires_grad


@pytest.mark.parametrize("reset_rows", [False, True])
def test_episodes_are_counted_across_rollouts_as_by_hand(reset_rows: bool) -> None:
    env = CounterEnvs(3, reset_rows=reset_rows)
    source = collector(env, length=4)
    returns, lengths, successes = [], [], []
    for _ in range(6):
        _, episodes = source.collect()
        returns += episodes.returns
        lengths += episodes.lengths
        successes += episodes.successes
    assert len(returns) > 12
    assert list(zip(returns, lengths, strict=True)) == env.finished
    # Only environment 1 reports: its episodes succeed and fail in turn.
    assert successes == [1.0, 0.0] * (len(successes) // 2) + [1.0] * (len(successes) % 2) and len(successes) > 3


def test_first_episodes_are_left_out_where_starts_are_staggered() -> None:
    """Environment 0 ends episodes at its steps 3 and 8, 1 at 5 and 8, 2 at 3 and 8; 1 reports success and failure."""
    source, restored, anew = (collector(CounterEnvs(3), length=4, staggered=True) for _ in range(3))
    assert source.collect()[1] == Episodes([], [], [])
    restored.load_state_dict(source.state_dict())
    anew.env.exact_resume = False  # what runs after resuming are first episodes again
    anew.load_state_dict(source.state_dict())
    for goes_on in (source, restored):
        episodes = goes_on.collect()[1]
        assert (episodes.lengths, episodes.successes) == ([5, 3, 5], [0.0])
    assert anew.collect()[1].lengths == [3]


@pytest.mark.parametrize("staggered", [False, True])
def test_a_lost_episode_is_left_out_and_what_follows_is_a_first_one_again(staggered: bool) -> None:
    class Losing(CounterEnvs):
        """Its first episode ends at step 3, with its worker."""

        def step(self, action: Tensor) -> Step:
            step = super().step(action)
            step.valid.logical_and_(torch.tensor(len(self.actions) != 3))
            return step

    source = collector(Losing(1), length=4, staggered=staggered)
    # Then it ends at 8, left out where starts are staggered, and at 11.
    assert [source.collect()[1].lengths for _ in range(3)] == [[], [] if staggered else [5], [3]]


def test_an_episode_within_which_somebody_interrupted_is_left_out() -> None:
    class Interrupted(CounterEnvs):
        """Once, at its second step."""

        def step(self, action: Tensor) -> Step:
            if len(self.actions) == 1 and not interrupts:
                interrupts.append(1)
                raise KeyboardInterrupt
            return super().step(action)

    interrupts: list[int] = []
    source = collector(Interrupted(1), length=4)
    with pytest.raises(KeyboardInterrupt):
        source.collect()
    # Episodes end at steps 3 and 8; one step of the first was in the rollout that is lost.
    assert [source.collect()[1].lengths for _ in range(2)] == [[], [5]]


def test_a_reset_row_is_marked_and_no_transition() -> None:
    rollout, _ = collector(CounterEnvs(1, reset_rows=True)).collect()
    assert rollout.valid.flatten().tolist() == [True, True, True, False, True, True, True, True]
    assert rollout.obs[3].flatten().tolist() == [0, 0, 3] and rollout.obs[4].flatten().tolist() == [0, 1, 0]


def test_changed_actions_show_a_normaliser_or_policy_that_moved() -> None:
    policy = make_policy()
    source = collector(CounterEnvs(3), policy=policy)
    rollout, _ = source.collect()
    assert source.changed_actions(rollout) == 0
    theta = policy.theta.vector.clone()
    policy.theta.assign_(theta + 0.1)
    assert source.changed_actions(rollout) > 0.9
    policy.theta.assign_(theta)
    assert source.changed_actions(rollout) == 0
    policy.normalizer.update(rollout.obs.flatten(0, 1))
    assert source.changed_actions(rollout) > 0.9


def test_changed_actions_are_counted_where_actions_are_discrete() -> None:
    policy = make_policy("categorical")
    source = collector(CounterEnvs(3), policy=policy)
    rollout, _ = source.collect()
    assert source.changed_actions(rollout) == 0
    rollout.action[0, 0] = (rollout.action[0, 0] + 1) % 4
    assert source.changed_actions(rollout) == pytest.approx(1 / 24, rel=1e-12)


@pytest.mark.parametrize("kind", ["gaussian", "ordinal", "categorical", "bernoulli"])
def test_data_do_not_depend_on_how_environments_are_shared_out(kind: str) -> None:
    whole = collector(CounterEnvs(5), policy=make_policy(kind))
    parts = [
        collector(CounterEnvs(b - a, first=a), policy=make_policy(kind), shard=slice(a, b), total_envs=5)
        for a, b in ((0, 2), (2, 5))
    ]
    for _ in range(2):
        rollout, _ = whole.collect()
        shards = [part.collect()[0] for part in parts]
        for name in ("obs", "action", "reward"):
            joined = torch.cat([getattr(shard, name) for shard in shards], 1)
            # float64 matrix products of 2, 3 and 5 rows may be summed in different orders.
            torch.testing.assert_close(joined, getattr(rollout, name), rtol=1e-13, atol=1e-13)


def test_a_restored_collector_goes_on_bitwise_and_finishes_running_episodes() -> None:
    source = collector(CounterEnvs(3), length=4)
    source.collect()
    state = source.state_dict()
    restored = collector(CounterEnvs(3), length=4)
    restored.load_state_dict(state)
    for _ in range(3):
        (rollout, episodes), (again, again_episodes) = source.collect(), restored.collect()
        assert again_episodes == episodes and episodes.returns
        for name in ("obs", "next_obs", "action", "reward", "terminated", "truncated", "valid"):
            assert torch.equal(getattr(again, name), getattr(rollout, name))
