"""What an agent makes of a rollout: advantages and value targets, against `gae` called by hand."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from dataclasses import fields, replace
from threading import get_ident
from time import sleep
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from helpers import randn, seeded, torch_kl
from test_normalizer import discounted_returns

import trpo.agent
from trpo.advantages import gae, standardize
from trpo.agent import Agent
from trpo.batch import Batch, Rollout
from trpo.config import Config
from trpo.errors import ConfigError, EnvError
from trpo.natural_gradient import Outcome, StepReport, trust_region_step
from trpo.normalizer import EPSILON
from trpo.policy import Policy
from trpo.runtime.distributed import Group, join_group
from trpo.runtime.random_streams import stream_seed
from trpo.runtime.timers import PhaseTimers
from trpo.value import explained_variance

CPU = torch.device("cpu")
STEPS, ENVS, OBS, ACTIONS = 12, 4, 3, 2


def make_agent(
    *,
    natural_gradient: dict[str, object] | None = None,
    policy: dict[str, object] | None = None,
    value: dict[str, object] | None = None,
    threads: int = 1,
    dtype: str = "float64",
    group: Group | None = None,
    **gae_settings: object,
) -> Agent:
    config = Config.model_validate(
        {
            "env": {"id": "Pendulum-v1", "num_envs": ENVS},
            "dtype": dtype,
            "threads": threads,
            "batch_size": STEPS * ENVS,
            "normalize": {"rewards": False},
            "gae": gae_settings,
            "policy": {"bins": None, **(policy or {})},  # rollouts have actions of any size
            "value": value or {},
            "natural_gradient": natural_gradient or {},
        }
    )
    spaces = Box(-np.inf, np.inf, (OBS,)), Box(-1, 1, (ACTIONS,), np.float32)
    return Agent(config, *spaces, num_envs=ENVS, group=group or join_group(CPU), device=CPU)


def make_rollout() -> Rollout:
    """What is acted on is what came last, but after an end."""
    terminated = torch.rand(STEPS, ENVS, generator=seeded(5)) < 0.2
    truncated = ~terminated & (torch.rand(STEPS, ENVS, generator=seeded(6)) < 0.2)
    obs, last = randn(STEPS, ENVS, OBS, seed=1), randn(STEPS, ENVS, OBS, seed=2)
    next_obs = torch.cat([obs[1:], last[-1:]])
    return Rollout(
        obs=obs,
        next_obs=torch.where((terminated | truncated).unsqueeze(-1), last, next_obs),
        action=randn(STEPS, ENVS, ACTIONS, seed=3),
        reward=randn(STEPS, ENVS, seed=4),
        terminated=terminated,
        truncated=truncated,
        valid=torch.ones(STEPS, ENVS, dtype=torch.bool),
    )


@pytest.mark.parametrize("value_lambda", [0.0, 0.6, 1.0])
def test_advantages_and_targets_have_a_lambda_each(value_lambda: float) -> None:
    agent, rollout = make_agent(**{"gamma": 0.9, "lambda": 0.3, "value_lambda": value_lambda}), make_rollout()
    batch, target, value = agent.prepare(rollout, progress=0.0)
    now, then = (agent.average_value(agent.policy.normalizer(x).flatten(0, 1)) for x in (rollout.obs, rollout.next_obs))

    def by_hand(lambda_: float) -> tuple[torch.Tensor, torch.Tensor]:
        ends = rollout.terminated, rollout.truncated
        shaped = (x.view(STEPS, ENVS) for x in (now, then))
        return gae(rollout.reward, *shaped, *ends, gamma=0.9, lambda_=lambda_)

    assert torch.equal(value, now)
    # The same operations; V of successors is asked in other batches, in which torch may round otherwise.
    torch.testing.assert_close(target, by_hand(value_lambda)[1].flatten(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(batch.advantage, standardize(by_hand(0.3)[0].flatten()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("steps", [1, STEPS])
def test_v_is_asked_once_of_what_is_acted_on_next(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    agent, rollout = make_agent(), make_rollout()
    rollout = Rollout(**{field.name: getattr(rollout, field.name)[:steps] for field in fields(rollout)})
    if steps > 1:  # an end of which all but one coordinate is that of the next start
        ends = (rollout.terminated | rollout.truncated)[:-1].nonzero()
        t, n = ends[0].tolist()
        rollout.next_obs[t, n] = rollout.obs[t + 1, n]
        rollout.next_obs[t, n, -1] += 1.0
        assert 1 < len(ends) < ENVS * (steps - 1), "some end, some go on"
    asked: list[int] = []
    value_of = agent.average_value.__call__

    def ask(obs: torch.Tensor) -> torch.Tensor:
        asked.append(len(obs))
        return value_of(obs)

    monkeypatch.setattr(agent, "average_value", ask)
    value, next_value = agent._values(rollout)
    ended = (rollout.terminated | rollout.truncated)[:-1].sum()
    assert asked == [steps * ENVS, int(ended) + ENVS]
    # Rounding of float64, in batches of other sizes.
    for found, obs in ((value, rollout.obs), (next_value, rollout.next_obs)):
        torch.testing.assert_close(found.flatten(), value_of(obs.flatten(0, 1)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("normalize", [True, False])
def test_a_batch_stays_what_it_is_when_the_rollout_is_overwritten(normalize: bool) -> None:
    agent, rollout = make_agent(), make_rollout()
    agent.policy.normalizer.enabled = normalize
    batch, target, value = agent.prepare(rollout, progress=0.0)
    kept = copy.deepcopy((batch, target, value))
    for field in fields(rollout):
        getattr(rollout, field.name).zero_()
    for now, before in zip(
        (batch.obs, batch.action, batch.advantage, target, value),
        (kept[0].obs, kept[0].action, kept[0].advantage, *kept[1:]),
        strict=True,
    ):
        assert torch.equal(now, before) and now.any()


def test_rewards_are_scaled_by_returns_that_end_with_their_episodes_however_these_end() -> None:
    agent, rollout = make_agent(gamma=0.9), make_rollout()
    agent.reward_scaler.enabled = True
    assert rollout.terminated[:-1].any() and rollout.truncated[:-1].any()
    returns = discounted_returns(rollout.reward, rollout.terminated | rollout.truncated, rollout.valid, 0.9)
    expected = rollout.reward / np.sqrt(np.var(returns) + EPSILON)
    # Moments of 48 numbers in float64, summed in another order.
    torch.testing.assert_close(agent.scale(rollout).reward, expected, rtol=1e-12, atol=0)


def test_a_rollout_of_resets_alone_is_refused() -> None:
    agent, rollout = make_agent(), make_rollout()
    theta = agent.policy.theta.vector.clone()
    rollout.valid.fill_(False)
    with pytest.raises(EnvError, match="a whole rollout was resets, without one transition"):
        agent.update(rollout, progress=0.0, timers=PhaseTimers())
    assert torch.equal(agent.policy.theta.vector, theta)


@pytest.mark.parametrize(
    ("gamma", "value_lambda"), [(0.0, 0.5), (0.75, 0.75), (0.99, 0.95), (0.9999, 0.995), (1.0, 1.0)]
)
def test_left_alone_the_lambda_of_targets_follows_the_discount(gamma: float, value_lambda: float) -> None:
    rollout = make_rollout()
    followed, given = (
        make_agent(gamma=gamma, value_lambda=v).prepare(rollout, progress=0.0)[1] for v in (None, value_lambda)
    )
    torch.testing.assert_close(followed, given, rtol=0, atol=1e-12)  # 1 − ½√(1 − γ) is computed


@pytest.mark.parametrize(
    ("gamma", "first", "last"), [(0.5, 1 - 0.5**0.5, 0.0), (0.99, 0.9, 0.8), (0.9999, 0.99, 0.98), (1.0, 1.0, 1.0)]
)
def test_left_alone_the_lambda_of_advantages_follows_the_discount(gamma: float, first: float, last: float) -> None:
    rollout, agent = make_rollout(), make_agent(gamma=gamma)
    for progress, lambda_ in [(0.0, first), (1.0, last)]:
        followed, _, _ = agent.prepare(rollout, progress=progress)
        given, _, _ = make_agent(gamma=gamma, **{"lambda": lambda_}).prepare(rollout, progress=progress)
        torch.testing.assert_close(followed.advantage, given.advantage, rtol=0, atol=1e-12)  # a root is computed


def test_advantages_are_estimated_with_the_average_of_the_fits() -> None:
    agent, rollout = make_agent(value={"ema_decay": 0.5}), make_rollout()
    fits = []
    for _ in range(2):
        agent.update(rollout, progress=0.0, timers=PhaseTimers())
        fits.append(agent.value.theta.vector.clone())
    _, _, value = agent.prepare(rollout, progress=0.0)
    agent.value.theta.assign_((fits[0] + fits[1]) / 2)
    obs = agent.policy.normalizer(rollout.obs).flatten(0, 1)
    torch.testing.assert_close(value, agent.value(obs).detach(), rtol=0, atol=1e-12)  # lerp rounds otherwise
    assert not torch.equal(fits[0], fits[1])


def test_what_is_explained_after_a_fit_is_so_by_v_and_not_by_the_average() -> None:
    agent, rollout = make_agent(value={"ema_decay": 0.5}), make_rollout()
    for _ in range(2):  # until the first fit is over, the average is V
        obs = agent.policy.normalizer(rollout.obs).flatten(0, 1)  # as the fit saw them: statistics move after it
        _, target, _ = agent.prepare(rollout, progress=0.0)
        report = agent.update(rollout, progress=0.0, timers=PhaseTimers())
    expected, average = (explained_variance(v(obs).detach(), target) for v in (agent.value, agent.average_value))
    assert report.explained_variance_after == pytest.approx(expected, rel=1e-9)  # tanh rounds otherwise with a graph
    assert abs(expected - average) > 1e-4


@pytest.mark.parametrize("fit", ["adam", "gauss_newton"])
def test_the_learning_rate_is_reported_as_it_moves_with_progress(fit: str) -> None:
    agent = make_agent(value={"fit": fit, "adam": {"learning_rate": {"start": 0.004, "end": 0.002}}})
    for progress, rate in [(0.0, 0.004), (0.5, 0.003), (1.0, 0.002)]:
        report = agent.update(make_rollout(), progress=progress, timers=PhaseTimers())
        assert report.learning_rate == (pytest.approx(rate, rel=1e-12) if fit == "adam" else None)


def test_before_learning_starts_all_but_the_policy_learns() -> None:
    agent = make_agent()
    theta, v = agent.policy.theta.vector.clone(), agent.value.theta.vector.clone()
    report = agent.update(make_rollout(), progress=0.0, timers=PhaseTimers(), policy_learns=False)
    assert report.step.outcome is Outcome.RESTED and not report.step.accepted and not report.step.numerics_failed
    assert torch.equal(agent.policy.theta.vector, theta) and not torch.equal(agent.value.theta.vector, v)
    assert report.fit.loss_after < report.fit.loss_before
    assert agent.policy.normalizer.moments.count > 0


@pytest.mark.parametrize("fit_first", [False, True])
def test_the_policy_learns_from_advantages_by_values_fitted_before_or_after(
    fit_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent, rollout = make_agent(value={"fit_first": fit_first}), make_rollout()
    seen: list[Batch] = []

    def observed(policy: Policy, batch: Batch, **settings: Any) -> StepReport:
        seen.append(batch)
        return trust_region_step(policy, batch, **settings)

    monkeypatch.setattr(trpo.agent, "trust_region_step", observed)
    before, target, predicted = agent.prepare(rollout, progress=0.0)
    normalizer = copy.deepcopy(agent.policy.normalizer)
    report = agent.update(rollout, progress=0.0, timers=PhaseTimers())
    agent.policy.normalizer = normalizer  # its statistics have moved since
    after, _, _ = agent.prepare(rollout, progress=0.0)
    (used,) = seen
    assert torch.equal(used.advantage, (after if fit_first else before).advantage)
    assert not torch.equal(after.advantage, before.advantage)
    # Either way the targets are those of V before the fit, and so is what it is said to have explained.
    assert report.fit.loss_before == pytest.approx(float((predicted - target).square().mean()))
    assert report.explained_variance_before == pytest.approx(explained_variance(predicted, target))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("fit", ["adam", "gauss_newton"])
def test_a_second_thread_changes_no_bit(fit: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """V fitted beside the policy's step or after it: neither reads what the other writes."""
    policy_step = trpo.agent.trust_region_step
    agents, reports = [], []
    for threads in (1, 2):
        settings = {"value": {"fit": fit}, "natural_gradient": {"fisher_subsample": 0.5}, "dtype": dtype}
        agent, seen = make_agent(**settings, threads=threads), set()

        def noted(function: Callable[..., Any], seen: set[int] = seen) -> Callable[..., Any]:
            return lambda *args, **keywords: seen.add(get_ident()) or function(*args, **keywords)

        monkeypatch.setattr(agent.value_fit, "fit", noted(agent.value_fit.fit))
        monkeypatch.setattr(trpo.agent, "trust_region_step", noted(policy_step))
        rollout = make_rollout()
        rollout = replace(rollout, action=rollout.action.to(agent.policy.theta.vector))
        reports.append([agent.update(rollout, progress=0.0, timers=PhaseTimers()).fit for _ in range(3)])
        agents.append(agent)
        assert (len(seen) > 1) == (threads > 1)
    assert reports[0] == reports[1]
    for part in ("policy", "value"):
        assert torch.equal(*(getattr(agent, part).theta.vector for agent in agents))
    for generator in ("fit_generator", "fisher_generator"):
        assert torch.equal(*(getattr(agent, generator).get_state() for agent in agents))


def test_the_thread_that_fits_v_has_one_of_torchs_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    agent, seen = make_agent(threads=2), []
    fit_value, before = agent.value_fit.fit, torch.get_num_threads()

    def noted(*args: Any, **keywords: Any) -> Any:
        seen.append(torch.get_num_threads())
        return fit_value(*args, **keywords)

    monkeypatch.setattr(agent.value_fit, "fit", noted)
    try:
        torch.set_num_threads(2)
        agent.update(make_rollout(), progress=0.0, timers=PhaseTimers())
        assert (seen, torch.get_num_threads()) == ([1], 2)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("rank", [0, 1])
def test_each_generator_follows_a_stream_of_its_own_of_its_process(rank: int) -> None:
    agent = make_agent(group=Group(rank, 2))
    for generator, stream in ((agent.fit_generator, "value_fit"), (agent.fisher_generator, "fisher")):
        expected = seeded(stream_seed(agent.config.seed, stream, rank))
        assert torch.equal(generator.get_state(), expected.get_state())
    assert not torch.equal(agent.fit_generator.get_state(), agent.fisher_generator.get_state())


@pytest.mark.parametrize("settings", [{"threads": 1}, {"threads": 2}, {"value": {"fit_first": True}}])
@pytest.mark.parametrize("policy_learns", [True, False])
def test_v_is_fitted_once_and_before_the_policy_moves_with_its_statistics(
    settings: dict[str, Any], policy_learns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent, counts = make_agent(**settings), []
    fit_value = agent.value_fit.fit

    def noted(*args: Any, **keywords: Any) -> Any:
        counts.append(float(agent.policy.normalizer.moments.count))
        return fit_value(*args, **keywords)

    monkeypatch.setattr(agent.value_fit, "fit", noted)
    for _ in range(2):
        agent.update(make_rollout(), progress=0.0, timers=PhaseTimers(), policy_learns=policy_learns)
    assert counts == [0, STEPS * ENVS]


def test_a_policy_step_that_fails_waits_for_the_fit_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    agent, done = make_agent(threads=2), []
    fit_value = agent.value_fit.fit

    def slow(*args: Any, **keywords: Any) -> Any:
        sleep(0.2)
        report = fit_value(*args, **keywords)
        done.append(report)
        return report

    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("of the step")

    monkeypatch.setattr(agent.value_fit, "fit", slow)
    monkeypatch.setattr(trpo.agent, "trust_region_step", fails)
    with pytest.raises(RuntimeError, match="of the step"):
        agent.update(make_rollout(), progress=0.0, timers=PhaseTimers())
    assert done


def test_the_discount_moves_with_progress_and_neither_the_scale_of_rewards_nor_the_lambda_of_targets_does() -> None:
    agent, rollout = make_agent(gamma={"start": 0.75, "end": 0.95}), make_rollout()
    for progress, gamma in [(0.0, 0.75), (0.25, 0.8), (1.0, 0.95)]:
        _, target, _ = agent.prepare(rollout, progress=progress)
        _, expected, _ = make_agent(gamma=gamma, value_lambda=0.75).prepare(rollout, progress=0.0)
        torch.testing.assert_close(target, expected, rtol=0, atol=1e-12)  # 0.8 is computed, with its rounding
    assert agent.reward_scaler.gamma == 0.75


def test_lambda_moves_with_progress() -> None:
    agent, rollout = make_agent(**{"lambda": {"start": 0.9, "end": 0.5}}), make_rollout()
    for progress, lambda_ in [(0.0, 0.9), (0.25, 0.8), (1.0, 0.5)]:
        batch, _, _ = agent.prepare(rollout, progress=progress)
        expected, _, _ = make_agent(**{"lambda": lambda_}).prepare(rollout, progress=progress)
        torch.testing.assert_close(batch.advantage, expected.advantage, rtol=0, atol=1e-12)  # 0.8 is computed


def test_a_given_std_moves_with_progress() -> None:
    agent = make_agent(policy={"std": {"start": 0.9, "end": 0.1, "shape": "geometric"}})
    for progress, std in [(0.0, 0.9), (0.5, 0.3), (1.0, 0.1)]:
        agent.set_std(progress)
        report = agent.update(make_rollout(), progress=progress, timers=PhaseTimers())
        assert agent.policy.std() == report.std == pytest.approx(std, rel=1e-12)


@pytest.mark.parametrize(("per_dimension", "bound"), [(True, 1e-3 * ACTIONS), (False, 1e-3)])
def test_the_bound_is_that_of_one_action_dimension_or_of_all_together(per_dimension: bool, bound: float) -> None:
    agent = make_agent(natural_gradient={"max_kl": 1e-3, "max_kl_per_dimension": per_dimension})
    step = agent.update(make_rollout(), progress=0.0, timers=PhaseTimers()).step
    assert step.max_kl == bound
    assert step.accepted and 0.5 * bound < step.kl <= bound  # the search shrinks by 0.8 and met no obstacle


def test_the_bound_cools_down_at_the_end() -> None:
    settings = {"max_kl": {"start": 0.004, "end": 0.002}, "cooldown": 0.5, "max_kl_per_dimension": False}
    agent = make_agent(natural_gradient=settings)
    for progress, bound in [(0.0, 0.004), (0.5, 0.003), (0.75, 0.0025 * 0.55), (1.0, 0.0002)]:
        step = agent.update(make_rollout(), progress=progress, timers=PhaseTimers()).step
        assert step.max_kl == pytest.approx(bound, rel=1e-12)


@pytest.mark.parametrize("std", [{}, {"state_dependent": True}])
def test_what_the_normaliser_moves_is_the_kl_between_the_policy_before_and_after_it(std: dict[str, Any]) -> None:
    agent, rollout = make_agent(policy={"std": std}), make_rollout()
    for _ in range(2):  # the second time statistics move from those of one rollout to those of two
        rollout = replace(rollout, obs=3 * rollout.obs + 1)
        report = agent.update(rollout, progress=0.0, timers=PhaseTimers())
    policy, raw = agent.policy, rollout.obs.flatten(0, 1)
    first = copy.deepcopy(policy.normalizer)
    first.moments = type(first.moments)(OBS)
    first.moments.update(3 * make_rollout().obs.flatten(0, 1) + 1)
    first.refresh()
    with torch.no_grad():
        p, q = policy(first(raw)), policy(policy.normalizer(raw))
    expected, reverse = (float(torch_kl(policy.distribution, *pair).mean()) for pair in ((p, q), (q, p)))
    assert expected > 1e-6 and report.normalizer_kl == pytest.approx(expected, rel=1e-9)
    assert not std or abs(reverse / expected - 1) > 1e-6  # of one σ for all states both directions are the same


def test_actions_that_their_dtype_cannot_tell_apart_are_refused() -> None:
    far = Box(2e7, 2e7 + 4, (1,), np.float64)
    for dtype in ("float32", "float64"):
        config = Config.model_validate({"env": {"id": "Pendulum-v1", "num_envs": ENVS}, "dtype": dtype})
        arguments = {"num_envs": ENVS, "group": join_group(CPU), "device": CPU}
        if dtype == "float32":
            with pytest.raises(ConfigError, match=r"policy.bins: float32 cannot tell .*: put .*RescaleAction into env"):
                Agent(config, Box(-np.inf, np.inf, (OBS,)), far, **arguments)
        else:
            Agent(config, Box(-np.inf, np.inf, (OBS,)), far, **arguments)


def test_an_agent_that_nobody_has_any_more_is_gone_at_once() -> None:
    """Without the garbage collector: on a GPU its memory would wait for that."""
    gc.disable()
    try:
        agent = make_agent()
        gone = weakref.ref(agent.policy)
        del agent
        assert gone() is None
    finally:
        gc.enable()
