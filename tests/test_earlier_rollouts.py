"""Learning from earlier rollouts again, against the surrogate of their own policies by automatic differentiation."""

from __future__ import annotations

import copy
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import config_for
from gymnasium.spaces import Box
from helpers import randn, seeded
from test_resume import differences, last_state, resume, table, train

from trpo.advantages import gae, standardize
from trpo.agent import Agent, UpdateReport
from trpo.batch import Rollout
from trpo.config import Config
from trpo.earlier_rollouts import MAX_WEIGHT, effective_share, importance_weight
from trpo.run.metrics import EVALUATIONS_FILE, PROGRESS_FILE
from trpo.runtime.distributed import Group, join_group
from trpo.runtime.timers import PhaseTimers
from trpo.trainer import Trainer

CPU = torch.device("cpu")
STEPS, ENVS, OBS = 12, 4, 3
GAMMA, LAMBDA = 0.9, 0.7


def make_agent(reuse: int, *, group: Group | None = None, **value: Any) -> Agent:
    config = Config.model_validate(
        {
            "env": {"id": "Pendulum-v1", "num_envs": ENVS},
            "dtype": "float64",
            "batch_size": STEPS * ENVS,
            "reuse_rollouts": reuse,
            "gae": {"gamma": GAMMA, "lambda": LAMBDA},
            "policy": {"bins": None, "hidden_sizes": (8,)},
            "value": {"hidden_sizes": (8,), **value},
            "natural_gradient": {"max_kl": 0.01},
        }
    )
    spaces = Box(-np.inf, np.inf, (OBS,)), Box(-1, 1, (1,), np.float32)
    return Agent(config, *spaces, num_envs=ENVS, group=group or join_group(CPU), device=CPU)


def rollout_of(agent: Agent, seed: int) -> Rollout:
    """Of the policy as it is; some rows are resets, and some episodes end."""
    generator = seeded(seed)
    obs = 2 * randn(STEPS + 1, ENVS, OBS, seed=seed)
    noise = agent.policy.noise(STEPS * ENVS, generator=generator)
    action = agent.policy.sample(obs[:-1].flatten(0, 1), noise).view(STEPS, ENVS, 1).clone()
    terminated = torch.rand(STEPS, ENVS, generator=generator) < 0.2
    return Rollout(
        obs=obs[:-1],
        next_obs=obs[1:],
        action=action,
        reward=-(action - obs[:-1, :, :1]).square().squeeze(-1),
        terminated=terminated,
        truncated=~terminated & (torch.rand(STEPS, ENVS, generator=generator) < 0.2),
        valid=torch.rand(STEPS, ENVS, generator=generator) < 0.9,
    )


def update(agent: Agent, rollout: Rollout) -> UpdateReport:
    return agent.update(rollout, progress=0.5, timers=PhaseTimers())


@pytest.mark.parametrize("fit_first", [False, True])
def test_an_update_climbs_the_surrogate_of_the_policies_that_acted(fit_first: bool) -> None:
    """Gradient at θ_old of E[π_θ(a|s)/π_then(a|s) Â] over the newest rollout and the one before."""
    agent = make_agent(1, fit_first=fit_first)
    update(agent, rollout_of(agent, 1))
    then, earlier = copy.deepcopy(agent.policy), rollout_of(agent, 2)
    kept = copy.deepcopy(earlier)
    update(agent, earlier)
    for field in fields(earlier):  # as a collector does, whose buffers they are
        getattr(earlier, field.name).zero_()
    newest, old = rollout_of(agent, 3), copy.deepcopy(agent)
    batch = update(agent, newest).batch

    scaler = agent.reward_scaler  # which has seen the newest rewards, as the update had
    critic = agent.average_value if fit_first else old.average_value
    log_then, log_now, advantages, obs = [], [], [], []
    for rollout, actor in ((kept, then), (newest, old.policy)):
        rows = rollout.valid.flatten()
        theta = old.policy.normalizer
        value, next_value = (critic(theta(x).flatten(0, 1)).view(STEPS, ENVS) for x in (rollout.obs, rollout.next_obs))
        ends = rollout.terminated, rollout.truncated
        advantage, _ = gae(
            scaler(rollout.reward), value, next_value, *ends, gamma=GAMMA, lambda_=LAMBDA, valid=rollout.valid
        )
        raw, action = rollout.obs.flatten(0, 1)[rows], rollout.action.flatten(0, 1)[rows]
        log_then.append(actor.distribution.log_prob(actor(actor.normalizer(raw)), action).detach())
        log_now.append(old.policy.distribution.log_prob(old.policy(theta(raw)), action))
        advantages.append(advantage.flatten()[rows])
        obs.append(theta(raw))
    ratio = torch.exp(torch.cat(log_now) - torch.cat(log_then))
    assert (ratio[: len(log_then[0])] - 1).abs().max() > 0.01, "the policy moved"
    assert ratio.max() < MAX_WEIGHT
    surrogate = (ratio * standardize(torch.cat(advantages))).mean()
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(surrogate, [*old.policy.network.parameters()])])

    assert len(batch.obs) == len(ratio) and batch.weight is not None
    linearization = old.policy.linearize(batch.obs)
    scores = old.policy.distribution.score(linearization.output, batch.action)
    found = linearization.vjp(scores * batch.advantage.unsqueeze(-1)) / len(batch.obs)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)  # sums of float64 in another order
    # Environments side by side in time order: the same samples, rearranged.
    for ours, theirs in ((batch.obs, torch.cat(obs)), (batch.weight.unsqueeze(-1), ratio.unsqueeze(-1))):
        a, b = (x[:, 0].detach().sort().values for x in (ours, theirs))
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_as_many_rollouts_are_kept_as_asked_for_and_v_is_fitted_to_the_newest() -> None:
    agent, sizes, fitted = make_agent(2), [], []
    fit = agent.value_fit.fit
    agent.value_fit.fit = lambda value, obs, *args, **kw: fitted.append(len(obs)) or fit(value, obs, *args, **kw)
    valid = []
    for seed in range(4):
        rollout = rollout_of(agent, seed)
        valid.append(int(rollout.valid.sum()))
        report = update(agent, rollout)
        sizes.append(len(report.batch.obs))
        assert report.transitions == valid[-1]
    assert sizes == [sum(valid[max(0, i - 2) : i + 1]) for i in range(4)]
    assert fitted == valid


def test_without_earlier_rollouts_nothing_is_weighted() -> None:
    agent = make_agent(0)
    update(agent, rollout_of(agent, 1))
    report = update(agent, rollout_of(agent, 2))
    assert report.batch.weight is None and report.effective_share is None
    assert agent.local_state_dict()["earlier_rollouts"] == []


def test_a_weight_is_the_ratio_of_probabilities_and_bounded() -> None:
    now, then = torch.tensor([0.5, 0.1, 0.9]).log(), torch.tensor([0.4, 0.2, 0.1]).log()
    torch.testing.assert_close(importance_weight(now, then), torch.tensor([1.25, 0.5, MAX_WEIGHT]))


def test_the_effective_share_is_that_of_as_many_equal_weights() -> None:
    assert effective_share(torch.ones(7)) == 1.0
    assert math.isclose(effective_share(torch.tensor([1.0, 1.0, 0.0, 0.0])), 0.5)
    assert math.isclose(effective_share(torch.tensor([3.0, 1.0])), 16 / 20)


@pytest.mark.parametrize("until", [1, 2])
def test_a_run_resumes_to_the_bit_and_a_run_from_before_the_setting_begins_with_none(
    until: int, tmp_path: Path
) -> None:
    def config() -> Config:
        changes = {"batch_size": 96, "total_steps": 4 * 96, "device": "cpu", "reuse_rollouts": 2}
        return config_for("CartPole-v1", env={"id": "CartPole-v1", "num_envs": 3}, **changes)

    whole = train(config(), tmp_path / "whole").directory
    run = train(config(), tmp_path / "parts", max_updates=until).directory
    resume(run)
    for name in (PROGRESS_FILE, EVALUATIONS_FILE):
        assert table(run, name) == table(whole, name)
    share = [float(row["trust_region/effective_share"]) for row in table(run, PROGRESS_FILE)]
    assert share[0] == pytest.approx(1.0) and all(0 < x < 1 for x in share[1:])
    assert differences(last_state(whole)["agent"], last_state(run)["agent"]) == []

    agent = Trainer(config(), root=tmp_path, console=False)
    state = agent.agent.local_state_dict()
    del state["earlier_rollouts"]
    agent.agent.load_local_state_dict(state)
    assert agent.agent.earlier.state_dict() == []
    agent.close()


def test_rollouts_of_other_environments_are_not_learned_from() -> None:
    agent = make_agent(1)
    update(agent, rollout_of(agent, 1))
    state = agent.local_state_dict()
    again = make_agent(1)
    again.load_local_state_dict(state)
    assert len(again.earlier.state_dict()) == 1
    again.load_local_state_dict(state, new_episodes=True)
    assert again.earlier.state_dict() == []
