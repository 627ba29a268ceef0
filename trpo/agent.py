"""The learner: policy, value function and scalers, and what one rollout does to them.

No environments, files or signals here: an agent turns rollouts into better policies, and the trainer does the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from typing import Any, TypeVar, assert_never

import torch
from gymnasium import spaces
from torch import Tensor

from trpo import native
from trpo.advantages import gae, horizon_lambda, standardize
from trpo.batch import Batch, PastRollout, Rollout
from trpo.config import Config, LearnedStdConfig
from trpo.config.schedule import cooldown, value_at
from trpo.distributions import Ordinal
from trpo.earlier_rollouts import EarlierRollouts, effective_share, importance_weight, joined
from trpo.errors import ConfigError, EnvError
from trpo.natural_gradient import Outcome, StepReport, blind_direction, trust_region_step
from trpo.networks.autograd_linearization import twice_differentiable
from trpo.networks.gaussian_heads import GivenStdHead
from trpo.normalizer import RewardScaler
from trpo.policy import build_policy
from trpo.runtime.cores import update_threads
from trpo.runtime.cuda_graph import Recorded, SecondQueue, can_record
from trpo.runtime.distributed import Group
from trpo.runtime.random_streams import stream_seed, torch_generator
from trpo.runtime.reduction import total_count
from trpo.runtime.timers import PhaseTimers
from trpo.value import AdamFit, AverageValue, FitReport, GaussNewtonFit, ValueFit, build_value, explained_variance

AnyRollout = TypeVar("AnyRollout", bound=Rollout)


@dataclass(frozen=True, slots=True)
class UpdateReport:
    """What one update did."""

    batch: Batch  # what the policy's step is computed from, if it takes one
    step: StepReport
    fit: FitReport
    transitions: int  # environment steps the update learned from, all processes together
    entropy: float  # mean policy entropy after the update, nats
    normalizer_kl: float  # mean KL by which the observation statistics moved the policy after that, nats; unbounded
    std: float  # mean σ of a state-independent Gaussian policy after the update, else NaN
    explained_variance_before: float  # of the return targets by the average V̄ that estimated them, before the fit
    explained_variance_after: float  # by V, after its fit
    effective_share: float | None  # of the batch: (Σw)²/(B Σw²) of its weights w (Kish 1965); None where it has none
    learning_rate: float | None  # of Adam, if V is fitted by it


class Agent:
    """Policy, value function and everything that learns.

    Args:
        config: all settings.
        observation_space: as the environment declares it, or that of flat observations [D].
        action_space: as the environment declares it.
        num_envs: environments of this process.
        group: this process among all.
        device: where networks and updates live.

    Attributes:
        threads: of an update, all together.
        torch_threads: those of them that torch should have; the others are for compiled code, or for V's fit.
    """

    def __init__(
        self,
        config: Config,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        *,
        num_envs: int,
        group: Group,
        device: torch.device,
    ):
        self.config = config
        self.group = group
        self.device = device
        init = torch_generator(config.seed, "initialisation")
        self.policy = build_policy(config, observation_space, action_space, generator=init, device=device)
        distribution = self.policy.distribution
        if isinstance(distribution, Ordinal) and not distribution.tells_apart(self.policy.theta.vector.dtype):
            raise ConfigError(
                f"policy.bins: {config.dtype} cannot tell the values of these actions apart, which lie too near each "
                "other: put gymnasium.wrappers:RescaleAction into env.wrappers"
            )
        self.value = build_value(config, self.policy.obs_dim, generator=init, device=device)
        self.average_value = AverageValue(self.value, config.value.ema_decay)
        self.reward_scaler = RewardScaler(
            num_envs,
            gamma=value_at(config.gae.gamma, 0.0),  # for good: a scale that grew with γ would be one more moving target
            clip=config.normalize.clip_rewards,
            enabled=config.normalize.rewards,
        ).to(device)
        self.earlier = EarlierRollouts(config.reuse_rollouts)
        # Compiled code shares a batch among threads to the same bits; what torch computes depends on how many it has.
        compiled = self.policy.compiled and self.value.compiled
        self.threads = update_threads(config.threads) if config.threads or compiled else 1
        # V is fitted while the policy takes its step, by the same operations: in one of the threads, or in a queue of
        # its own on a GPU. Not where sums over processes would meet in another order.
        apart = group.size == 1 and not config.value.fit_first
        self._thread_beside = apart and self.threads > 1 and device.type == "cpu"
        self._queue = SecondQueue(device) if apart and device.type == "cuda" and config.value.fit == "adam" else None
        self.torch_threads = 1 if compiled else self.threads - self._thread_beside
        self.fit_generator = torch.Generator().manual_seed(stream_seed(config.seed, "value_fit", group.rank))
        self.fisher_generator = torch.Generator().manual_seed(stream_seed(config.seed, "fisher", group.rank))
        self.value_fit = self._value_fit()
        self._recorded = Recorded(partial(blind_direction, self.policy))

    def _value_fit(self) -> ValueFit:
        settings = self.config.value
        match settings.fit:
            case "gauss_newton":
                return GaussNewtonFit(settings.gauss_newton, all_sum=self.group.all_sum)
            case "adam":
                return AdamFit(
                    settings.adam,
                    self.value,
                    generator=self.fit_generator,
                    learning_rate=partial(value_at, settings.adam.learning_rate),
                    all_sum=self.group.all_sum,
                )
            case _:
                assert_never(settings.fit)

    def update(
        self, rollout: Rollout, *, progress: float, timers: PhaseTimers, policy_learns: bool = True
    ) -> UpdateReport:
        """One iteration of TRPO on a rollout of the current policy.

        Args:
            rollout: collected with the policy and normaliser exactly as they are now.
            progress: 0 at the first update of the run, 1 at the last; drives schedules.
            timers: seconds of the phases go here.
            policy_learns: False before `learning_starts`: all but θ moves.
        """
        # Around both threads, which would otherwise take turns in setting and restoring what is torch's for both.
        with twice_differentiable(self.policy, self.value):
            return self._update(rollout, progress=progress, timers=timers, policy_learns=policy_learns)

    def _update(self, rollout: Rollout, *, progress: float, timers: PhaseTimers, policy_learns: bool) -> UpdateReport:
        values, all_sum = self.config.value, self.group.all_sum
        with timers("advantages"):
            samples = self.scale(rollout)
            newest, target, value_before = self.estimate(samples, progress=progress)
            if self.earlier.keep:
                samples = self._with_earlier(rollout, samples)
        # V is fitted once, whoever asks first.
        fit = cache(partial(self._fit, newest.obs, target, progress=progress, timers=timers))
        if values.fit_first:
            fit()
        batch = newest
        if values.fit_first or self.earlier.keep:
            with timers("advantages"):
                batch, _, _ = self.estimate(samples, progress=progress)
        step = partial(self._policy_step, batch, progress=progress, timers=timers) if policy_learns else _rest
        stepped, finish_fit = self._step_and_fit(
            step, fit, lambda queue: self._begin_fit(queue, newest.obs, target, progress=progress, timers=timers)
        )
        with timers("statistics"):
            # Last of all: until here the policy has to be the one that acted.
            sums = self._move_normalizer(rollout, newest)
        fitted = finish_fit()
        with timers("statistics"), torch.no_grad():
            value_after = self.value(newest.obs)
            entropy, moved, transitions = sums.tolist()
            return UpdateReport(
                batch,
                stepped,
                fitted,
                transitions=int(transitions),
                entropy=entropy / transitions,
                normalizer_kl=moved / transitions,
                std=self.policy.std(),
                explained_variance_before=explained_variance(value_before, target, all_sum),
                explained_variance_after=explained_variance(value_after, target, all_sum),
                effective_share=None if batch.weight is None else effective_share(batch.weight, all_sum),
                learning_rate=value_at(values.adam.learning_rate, progress) if values.fit == "adam" else None,
            )

    def _step_and_fit(
        self,
        step: Callable[[], StepReport],
        fit: Callable[[], FitReport],
        begin_fit: Callable[[SecondQueue], Callable[[], FitReport]],
    ) -> tuple[StepReport, Callable[[], FitReport]]:
        """The policy's step and V's fit, in turn or side by side, to the same numbers: the step, and what waits for the
        fit."""
        if self._thread_beside:
            # The other thread has as many threads of torch as were set last anywhere, unless it is told.
            with (
                native.spare_threads(-1) as is_idle_again,
                ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as thread,
            ):
                fitting = thread.submit(fit)
                fitting.add_done_callback(lambda _: is_idle_again())  # for the rest of the policy's step
                return step(), fitting.result
        if self._queue is None:
            stepped = step()
            fit()
            return stepped, fit
        finish = begin_fit(self._queue)
        try:
            return step(), finish
        except BaseException:
            self._queue.join()  # before its tensors are given to others
            raise

    @torch.no_grad()
    def _move_normalizer(self, rollout: Rollout, batch: Batch) -> Tensor:
        """Takes the rollout, given also as a batch, into the observation statistics; Σ entropies, Σ KL by which that
        moves π, Σ 1: [3]."""
        eta = self.policy(batch.obs)
        (raw_obs,) = _transitions(rollout.valid, rollout.obs)
        raw_obs = raw_obs.to(self.device)
        self.policy.normalizer.update(raw_obs, all_sum=self.group.all_sum)
        distribution, normalized = self.policy.distribution, self.policy.normalizer(raw_obs)
        entropies = distribution.entropy(eta)
        sums = [entropies, distribution.kl(eta, self.policy(normalized)), torch.ones_like(entropies)]
        return self.group.all_sum(torch.stack([x.sum(dtype=torch.float64) for x in sums]))

    def kl_bound(self, progress: float) -> float:
        """δ of the joint KL."""
        settings = self.config.natural_gradient
        dimensions = self.policy.distribution.action_dim if settings.max_kl_per_dimension else 1
        return dimensions * value_at(settings.max_kl, progress) * cooldown(settings.cooldown, progress)

    def _lambdas(self, progress: float) -> tuple[float, float]:
        """λ of the advantages, which believe V more as it gets better, and of its targets."""
        given, gamma = self.config.gae, value_at(self.config.gae.gamma, 0.0)
        return (
            horizon_lambda(gamma, 1 + progress) if given.lambda_ is None else value_at(given.lambda_, progress),
            horizon_lambda(gamma, 0.5) if given.value_lambda is None else given.value_lambda,
        )

    def set_std(self, progress: float) -> None:
        """Before a rollout: gives a σ that is not learned its value at the `progress` of the update to come."""
        std, head = self.config.policy.std, self.policy.network
        if isinstance(head, GivenStdHead) and not isinstance(std, LearnedStdConfig):
            head.set_std(value_at(std, progress))

    def _policy_step(self, batch: Batch, *, progress: float, timers: PhaseTimers) -> StepReport:
        settings = self.config.natural_gradient
        with timers("policy_update"):
            return trust_region_step(
                self.policy,
                batch,
                max_kl=self.kl_bound(progress),
                settings=settings,
                all_sum=self.group.all_sum,
                generator=self.fisher_generator,
                direction=self._recorded if self._can_record_direction else None,
            )

    @property
    def _can_record_direction(self) -> bool:
        """Whether `blind_direction` is all of it, and a graph can hold it."""
        settings = self.config.natural_gradient
        whole = settings.preconditioner is None and settings.fisher_subsample == 1
        return whole and self.group.size == 1 and can_record(self.device) and self.policy.closed_form

    def _fit(self, obs: Tensor, target: Tensor, *, progress: float, timers: PhaseTimers) -> FitReport:
        with timers("value_fit"):
            fit = self.value_fit.fit(self.value, obs, target, progress=progress)
            self.average_value.update(self.value)
            return fit

    def _begin_fit(
        self, queue: SecondQueue, obs: Tensor, target: Tensor, *, progress: float, timers: PhaseTimers
    ) -> Callable[[], FitReport]:
        """Starts `_fit` in another queue of a GPU; what is returned waits for its end."""
        assert isinstance(self.value_fit, AdamFit)  # whoever looks at every step has to be waited for
        with timers("value_fit"), queue.begin():
            finish = self.value_fit.start(self.value, obs, target, progress=progress)

        def joined() -> FitReport:
            with timers("value_fit"):
                queue.join()
                fit = finish()
                self.average_value.update(self.value)
                return fit

        return joined

    def prepare(self, rollout: Rollout, *, progress: float) -> tuple[Batch, Tensor, Tensor]:
        """`estimate` of a rollout that still has to be scaled, with V̄ as it is: what an update begins with.

        As there the statistics of rewards move on. Of the update that was just made, its report has the batch.
        """
        return self.estimate(self.scale(rollout), progress=progress)

    @torch.no_grad()
    def scale(self, rollout: Rollout) -> Rollout:
        """The rollout on the agent's device, observations normalised, rewards scaled with statistics that know them."""
        rollout = Rollout(**{field.name: getattr(rollout, field.name).to(self.device) for field in fields(Rollout)})
        # Before scaling, unlike observation statistics: the reward's scale does not touch the policy, and the first
        # targets of the value function have to be of order one too.
        self.reward_scaler.update(
            rollout.reward, rollout.terminated | rollout.truncated, rollout.valid, all_sum=self.group.all_sum
        )
        return self._scaled(rollout)

    def _scaled(self, rollout: AnyRollout) -> AnyRollout:
        return replace(
            rollout,
            obs=self.policy.normalizer(rollout.obs),
            next_obs=self.policy.normalizer(rollout.next_obs),
            reward=self.reward_scaler(rollout.reward),
        )

    @torch.no_grad()
    def _with_earlier(self, rollout: Rollout, scaled: Rollout) -> PastRollout:
        """All that the policy learns from, scaled, as of more environments [T, (K + 1)·N]; the newest rollout, given
        also as `scaled`, is among the earlier ones from now on."""
        log_prob = self._log_prob(scaled.obs.flatten(0, 1), scaled.action.flatten(0, 1)).view(scaled.reward.shape)
        # Copies: a rollout lies in its collector's buffers, which the next one overwrites.
        parts = {field.name: getattr(rollout, field.name).to(self.device, copy=True) for field in fields(Rollout)}
        together = [self._scaled(one) for one in self.earlier.rollouts]
        together.append(PastRollout(**{name: getattr(scaled, name) for name in parts}, log_prob=log_prob))
        self.earlier.rollouts.append(PastRollout(**parts, log_prob=log_prob))
        return joined(together)

    def _log_prob(self, obs: Tensor, action: Tensor) -> Tensor:
        """Of actions [B, A] for normalised observations [B, D] by the policy as it is: [B]."""
        return self.policy.distribution.log_prob(self.policy(obs), action)

    @torch.no_grad()
    def estimate(self, samples: Rollout, *, progress: float) -> tuple[Batch, Tensor, Tensor]:
        """Batch for the policy, value targets [B] and value predictions [B] by V̄; rows that are resets left out.

        Args:
            samples: of `scale`.
            progress: as in `update`.
        """
        value, next_value = self._values(samples)
        estimate = partial(
            gae,
            samples.reward.to(value.dtype),
            value,
            next_value,
            samples.terminated,
            samples.truncated,
            gamma=value_at(self.config.gae.gamma, progress),
            valid=samples.valid,
        )
        advantage_lambda, target_lambda = self._lambdas(progress)
        advantage, _ = estimate(lambda_=advantage_lambda)
        _, target = estimate(lambda_=target_lambda)
        parts = _transitions(samples.valid, samples.obs, samples.action, advantage, target, value)
        obs, action, advantage, target, value = parts
        if not total_count(len(obs), self.group.all_sum):
            raise EnvError(
                "a whole rollout was resets, without one transition: raise batch_size or mend the environment"
            )
        advantage = standardize(advantage, self.group.all_sum)
        if not isinstance(samples, PastRollout):
            return Batch(obs, action, advantage), target, value
        (log_prob_then,) = _transitions(samples.valid, samples.log_prob)
        weight = importance_weight(self._log_prob(obs, action), log_prob_then)
        return Batch(obs, action, advantage * weight, weight), target, value

    def _values(self, samples: Rollout) -> tuple[Tensor, Tensor]:
        """V̄(s) and V̄(s′) [T, N]. Most successors are what is acted on next; of those V̄ is asked once."""
        obs, next_obs = samples.obs, samples.next_obs
        value = self.average_value(obs.flatten(0, 1)).view(obs.shape[:2])
        goes_on = (next_obs[:-1] == obs[1:]).all(-1)
        ends = torch.cat([~goes_on, goes_on.new_ones(1, obs.shape[1])]).nonzero(as_tuple=True)
        next_value = torch.cat([value[1:], value[-1:]])
        next_value[ends] = self.average_value(next_obs[ends])
        return value, next_value

    def state_dict(self) -> dict[str, Any]:
        """What is the same on all processes."""
        return {
            "policy": dict(self.policy.state_dict()),
            "value": dict(self.value.state_dict()),
            "value_average": self.average_value.state_dict(),
            "value_fit": self.value_fit.state_dict(),
            "reward_moments": dict(self.reward_scaler.moments.state_dict()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.policy.load_state_dict(state["policy"])
        self.value.load_state_dict(state["value"])
        self.average_value.load_state_dict(state["value_average"])
        self.value_fit.load_state_dict(state["value_fit"])
        self.reward_scaler.moments.load_state_dict(state["reward_moments"])

    def local_state_dict(self) -> dict[str, Any]:
        """What is this process's own."""
        return {
            "reward_returns": self.reward_scaler.returns,
            "fit_generator": self.fit_generator.get_state(),
            "fisher_generator": self.fisher_generator.get_state(),
            "earlier_rollouts": self.earlier.state_dict(),
        }

    def load_local_state_dict(self, state: dict[str, Any], *, new_episodes: bool = False) -> None:
        """Takes up `local_state_dict`; with `new_episodes` the environments did not go on with theirs, and may be
        others."""
        self.reward_scaler.returns.copy_(state["reward_returns"] * (not new_episodes))
        self.fit_generator.set_state(state["fit_generator"])
        self.fisher_generator.set_state(state["fisher_generator"])
        # Runs that are older than the setting have none.
        self.earlier.load_state_dict([] if new_episodes else state.get("earlier_rollouts", []), self.device)


def _rest() -> StepReport:
    return StepReport(Outcome.RESTED)


def _transitions(valid: Tensor, *parts: Tensor) -> list[Tensor]:
    """The rows of each part [T, N, …] that are transitions [B, …], in memory of their own."""
    keep = valid.flatten().nonzero().squeeze(-1)
    flat = [x.flatten(0, 1) for x in parts]
    return [x.clone() if len(keep) == len(x) else x.index_select(0, keep) for x in flat]
