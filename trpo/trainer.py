"""Wires everything together: the training loop."""

from __future__ import annotations

import math
import signal
import statistics
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trpo.advantages import gae
from trpo.batch import Batch, Rollout
from trpo.checkpoint import CheckpointStore
from trpo.collector import Collector, Episodes
from trpo.config import Config
from trpo.distributed import Group, join_group, leave_group
from trpo.envs import make_envs
from trpo.errors import CheckpointError, UserError
from trpo.evaluation import Evaluation, evaluate
from trpo.metrics import MetricsWriter, PhaseTimers
from trpo.natural_gradient import StepReport, trust_region_step
from trpo.normalizer import RewardScaler
from trpo.policy import build_policy
from trpo.random_streams import stream_seed, torch_generator
from trpo.run_directory import RunDirectory
from trpo.saved_policy import save_policy
from trpo.schedule import value_at
from trpo.value import AdamFit, FitReport, GaussNewtonFit, ValueFit, build_value, explained_variance

RECENT_EPISODES = 100  # window of the running return, as users know it from other libraries


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a training run left behind."""

    directory: Path
    env_steps: int
    evaluation: Evaluation | None  # of the last policy; None if the run was stopped before its end
    stopped_by: signal.Signals | None = None

    @property
    def exit_status(self) -> int:
        return 128 + self.stopped_by if self.stopped_by else 0


class Trainer:
    """One training run from its config, in a new run directory or going on in an old one.

    Args:
        config: all settings.
        root: where run directories are made.
        resume: a run directory to go on in, from its newest valid checkpoint.
        console: show progress.
    """

    def __init__(
        self, config: Config, *, root: str | Path = "runs", resume: str | Path | None = None, console: bool = True
    ):
        self.config = config
        self.device = resolve_device(config.device)
        if config.threads:
            torch.set_num_threads(config.threads)
        self.group = join_group(self.device)
        self.shard = self.group.shard(config.env.num_envs)
        if self.shard.start == self.shard.stop:
            raise UserError(f"env.num_envs {config.env.num_envs} is less than the {self.group.size} processes")
        self._build()
        self.env_steps = 0
        self.updates = 0
        self.elapsed_s = 0.0
        self.best_return = -math.inf
        self.skipped_updates = 0
        self.recent_returns: deque[float] = deque(maxlen=RECENT_EPISODES)
        self.recent_lengths: deque[float] = deque(maxlen=RECENT_EPISODES)
        self.recent_successes: deque[float] = deque(maxlen=RECENT_EPISODES)
        self._open_run(Path(root), Path(resume) if resume else None, console)

    def _build(self) -> None:
        config, seed, group = self.config, self.config.seed, self.group
        seeds = [stream_seed(seed, "environments", i) for i in range(self.shard.start, self.shard.stop)]
        self.env = make_envs(config.env, seeds)
        observation_space, action_space = self.env.single_observation_space, self.env.single_action_space
        init = torch_generator(seed, "initialisation")
        self.policy = build_policy(config, observation_space, action_space, generator=init, device=self.device)
        self.value = build_value(config, observation_space.shape[0], generator=init, device=self.device)
        self.reward_scaler = RewardScaler(
            self.env.num_envs,
            gamma=config.gae.gamma,
            clip=config.normalize.clip_rewards,
            enabled=config.normalize.rewards,
        ).to(self.device)
        self.fit_generator = torch.Generator().manual_seed(stream_seed(seed, "value_fit", group.rank))
        self.fisher_generator = torch.Generator().manual_seed(stream_seed(seed, "fisher_subsample", group.rank))
        self.value_fit = self._value_fit()
        self.collector = Collector(
            self.env,
            self.policy,
            config.rollout_length,
            generator=torch_generator(seed, "actions", self.device),
            shard=self.shard,
            total_envs=config.env.num_envs,
        )

    def _value_fit(self) -> ValueFit:
        settings = self.config.value
        if settings.fit == "gauss_newton":
            return GaussNewtonFit(settings.gauss_newton, all_sum=self.group.all_sum)
        return AdamFit(
            settings.adam,
            self.value,
            generator=self.fit_generator,
            learning_rate=lambda progress: value_at(settings.adam.learning_rate, progress),
            all_sum=self.group.all_sum,
        )

    def _open_run(self, root: Path, resume: Path | None, console: bool) -> None:
        """Creates or opens the run directory, and takes up its newest checkpoint. Only rank 0 writes."""
        self.writer: MetricsWriter | None = None
        if self.group.leads:
            self.run = RunDirectory.open(resume) if resume else RunDirectory.create(root, self.config)
            self._lock = self.run.lock()
        directory = self.group.broadcast(str(self.run.path) if self.group.leads else None)
        if not self.group.leads:
            self.run = RunDirectory.open(Path(directory))
        self.store = CheckpointStore(self.run.checkpoints, keep=self.config.checkpoint.keep)
        resume_step = None
        if resume:
            found = self.store.newest()
            if found is None:
                raise CheckpointError(f"{resume}: no valid checkpoint to resume from; start a new run")
            self._load_state(found[1], found[0])
            resume_step = self.env_steps
        if self.group.leads:
            self.writer = MetricsWriter(
                self.run.path, total_steps=self.config.total_steps, console=console, resume_step=resume_step
            )

    # ---------------------------------------------------------------- the loop

    def train(self, *, max_updates: int | None = None) -> RunResult:
        """Trains to the end (or for `max_updates` more updates), then saves and evaluates the last policy.

        SIGTERM, SIGINT and SIGUSR1 finish the update under way, save a checkpoint and return; a second SIGINT
        interrupts at once.
        """
        last = self.config.updates if max_updates is None else min(self.config.updates, self.updates + max_updates)
        try:
            with _catch_signals() as received:
                while self.updates < last and not received:
                    self._iteration()
                    if self._any(bool(received)):
                        break
                return self._finish(received[0] if received else None)
        finally:
            self.close()

    def _iteration(self) -> None:
        started = time.perf_counter()
        timers = PhaseTimers()
        progress = self.progress
        with timers("rollout"):
            rollout, episodes = self.collector.collect()
        if self.updates == 0:
            self._check_policy_is_still(rollout)
        with timers("advantages"):
            batch, target, value_before = self._prepare(rollout)
        with timers("policy_update"):
            report = trust_region_step(
                self.policy,
                batch,
                max_kl=value_at(self.config.natural_gradient.max_kl, progress),
                settings=self.config.natural_gradient,
                all_sum=self.group.all_sum,
                generator=self.fisher_generator,
            )
        with timers("value_fit"):
            fit = self.value_fit.fit(self.value, batch.obs, target, progress=progress)
        with torch.no_grad():
            value_after = self.value(batch.obs)
            entropy = float(self.policy.distribution.entropy(self.policy(batch.obs)).mean())
        self.policy.normalizer.update(rollout.obs[rollout.valid].to(self.device), all_sum=self.group.all_sum)

        previous_steps = self.env_steps
        self.env_steps += int(self.group.all_sum(rollout.valid.sum(dtype=torch.float64)).item())
        self.updates += 1
        self.skipped_updates += not report.accepted
        self._note_episodes(episodes)
        duration = time.perf_counter() - started
        self.elapsed_s += duration
        self._write_metrics(
            report,
            fit,
            progress=progress,
            entropy=entropy,
            explained=(
                explained_variance(value_before, target, self.group.all_sum),
                explained_variance(value_after, target, self.group.all_sum),
            ),
            phases=timers.pop(),
            fps=(self.env_steps - previous_steps) / duration,
        )
        self._periodic(previous_steps)

    @property
    def progress(self) -> float:
        """Where the next update is between the first (0) and the last one (1)."""
        return self.updates / max(1, self.config.updates - 1)

    @torch.no_grad()
    def _prepare(self, rollout: Rollout) -> tuple[Batch, Tensor, Tensor]:
        """Rollout → (batch for the policy, value targets [B], value predictions [B]), invalid rows left out."""
        done = rollout.terminated | rollout.truncated
        reward = rollout.reward.to(self.device)
        valid = rollout.valid.to(self.device)
        self.reward_scaler.update(reward, done.to(self.device), valid, all_sum=self.group.all_sum)
        obs = self.policy.normalizer(rollout.obs.to(self.device))
        next_obs = self.policy.normalizer(rollout.next_obs.to(self.device))
        shape = reward.shape
        value = self.value(obs.flatten(0, 1)).view(shape)
        next_value = self.value(next_obs.flatten(0, 1)).view(shape)
        advantage, target = gae(
            self.reward_scaler(reward).to(value.dtype),
            value,
            next_value,
            rollout.terminated.to(self.device),
            rollout.truncated.to(self.device),
            gamma=self.config.gae.gamma,
            lambda_=self.config.gae.lambda_,
            valid=valid,
        )
        keep = valid.flatten().nonzero().squeeze(-1)
        rows = [x.flatten(0, 1)[keep] for x in (obs, rollout.action.to(self.device), advantage, target, value)]
        obs_rows, action, advantage, target, value = rows
        return Batch(obs_rows, action, standardize(advantage, self.group)), target, value

    def _check_policy_is_still(self, rollout: Rollout) -> None:
        """Contract at start-up: what acted is what is updated, so that ratio = 1 and KL = 0 at θ_old."""
        moved = self.collector.replay_error(rollout)
        if moved > 0.01:
            raise RuntimeError(f"the policy moved between rollout and update: {moved:.1%} of its actions changed")

    def _any(self, flag: bool) -> bool:
        """Whether the flag is up on any process: all have to leave the loop together."""
        return (self.group.size > 1 and bool(self.group.all_sum(torch.tensor(float(flag))).item())) or flag

    def _note_episodes(self, episodes: Episodes) -> None:
        for part in self.group.gather_objects(episodes):
            self.recent_returns.extend(part.returns)
            self.recent_lengths.extend(part.lengths)
            self.recent_successes.extend(part.successes)

    # ---------------------------------------------------------------- files

    def _write_metrics(
        self,
        report: StepReport,
        fit: FitReport,
        *,
        progress: float,
        entropy: float,
        explained: tuple[float, float],
        phases: dict[str, float],
        fps: float,
    ) -> None:
        if self.writer is None:
            return
        if not report.accepted:
            self.writer.message(f"update {self.updates} left the policy unchanged: {report.reason}")
        cg, search = report.cg, report.search
        metrics: dict[str, float | None] = {
            "rollout/ep_rew_mean": _mean(self.recent_returns),
            "rollout/ep_len_mean": _mean(self.recent_lengths),
            "rollout/success_rate": _mean(self.recent_successes),
            "time/fps": fps,
            "time/iterations": self.updates,
            "time/time_elapsed": self.elapsed_s,
            "time/total_timesteps": self.env_steps,
            "train/n_updates": self.updates,
            "train/policy_objective": report.gain,
            "train/kl_divergence_loss": report.kl,
            "train/is_line_search_success": float(report.accepted),
            "train/std": self.policy.std(),
            "train/value_loss": fit.loss_after,
            "train/explained_variance": explained[0],
            "train/learning_rate": value_at(self.config.value.adam.learning_rate, progress)
            if self.config.value.fit == "adam"
            else None,
            "value/loss_before": fit.loss_before,
            "value/explained_variance_after": explained[1],
            "value/refused_steps": fit.refused,
            "trust_region/max_kl": report.max_kl,
            "trust_region/quadratic_kl": report.quadratic_kl,
            "trust_region/kl": report.kl,
            "trust_region/expected_improvement": report.expected_gain,
            "trust_region/actual_improvement": report.gain,
            "trust_region/step_scale": report.scale,
            "trust_region/backtracks": search.tries - 1 if search else None,
            "trust_region/gradient_norm": report.gradient_norm,
            "trust_region/step_norm": report.step_norm,
            "trust_region/cg_iterations": cg.iterations if cg else None,
            "trust_region/cg_residual": cg.relative_residual if cg else None,
            "trust_region/max_ritz_value": float(cg.ritz_values[-1]) if cg and len(cg.ritz_values) else None,
            "trust_region/condition": cg.condition if cg else None,
            "trust_region/entropy": entropy,
            "trust_region/skipped_updates": self.skipped_updates,
            **{f"time/{phase}_s": seconds for phase, seconds in phases.items()},
        }
        self.writer.write(metrics, env_steps=self.env_steps)

    def _periodic(self, previous_steps: int) -> None:
        def due(every: int) -> bool:
            return every > 0 and self.env_steps // every > previous_steps // every

        if self.updates == self.config.updates:
            return  # `_finish` does both
        if due(self.config.evaluation.every_steps):
            self._evaluate(self.config.evaluation.episodes)
        if due(self.config.checkpoint.every_steps):
            self._save_checkpoint()

    def _evaluate(self, episodes: int) -> Evaluation | None:
        if not self.group.leads:
            return None
        started = time.perf_counter()
        result = evaluate(
            self.policy,
            self.config.env,
            self.env.single_action_space,
            episodes=episodes,
            seed=stream_seed(self.config.seed, "evaluation"),
        )
        self.elapsed_s += time.perf_counter() - started
        assert self.writer is not None
        self.writer.write_evaluation(result.metrics(), env_steps=self.env_steps)
        if result.mean > self.best_return:
            self.best_return = result.mean
            self._save_policy(self.run.best, result)
        return result

    def _save_policy(self, path: Path, result: Evaluation) -> None:
        info = {"env_steps": self.env_steps, "seed": self.config.seed, "evaluation": result.metrics()}
        save_policy(path, self.policy, self.config, self.env.single_action_space, info)

    def _finish(self, stopped_by: signal.Signals | None) -> RunResult:
        self._save_checkpoint()
        evaluation = None
        if stopped_by is None and self.updates == self.config.updates:
            evaluation = self._evaluate(self.config.evaluation.final_episodes)
            if evaluation is not None:
                self._save_policy(self.run.final, evaluation)
        elif self.writer is not None:
            why = stopped_by.name if stopped_by else "the update limit"
            self.writer.message(f"stopped by {why} at {self.env_steps} steps; go on with --resume {self.run.path}")
        return RunResult(self.run.path, self.env_steps, evaluation, stopped_by)

    def _save_checkpoint(self) -> None:
        self.group.assert_equal(self.policy.theta.vector, "the policy")
        state = self._state()
        if self.group.leads:
            try:
                self.store.save(state, env_steps=self.env_steps)
            except CheckpointError as error:
                assert self.writer is not None
                self.writer.message(f"warning: {error}; training goes on")

    def _state(self) -> dict[str, Any]:
        local = {
            "collector": self.collector.state_dict(),
            "reward_returns": self.reward_scaler.returns,
            "fit_generator": self.fit_generator.get_state(),
            "fisher_generator": self.fisher_generator.get_state(),
        }
        return {
            "config": self.config.model_dump(mode="json", by_alias=True),
            "policy": dict(self.policy.state_dict()),
            "value": dict(self.value.state_dict()),
            "value_fit": self.value_fit.state_dict(),
            "reward_moments": dict(self.reward_scaler.moments.state_dict()),
            "counters": {
                "env_steps": self.env_steps,
                "updates": self.updates,
                "elapsed_s": self.elapsed_s,
                "best_return": self.best_return,
                "skipped_updates": self.skipped_updates,
            },
            "recent": [list(self.recent_returns), list(self.recent_lengths), list(self.recent_successes)],
            "exact_resume": self.env.exact_resume,
            "processes": self.group.gather_objects(local),
        }

    def _load_state(self, state: dict[str, Any], path: Path) -> None:
        if len(state["processes"]) != self.group.size:
            raise CheckpointError(
                f"{path}: saved by {len(state['processes'])} processes, resumed with {self.group.size}; use as many"
            )
        try:
            self.policy.load_state_dict(state["policy"])
            self.value.load_state_dict(state["value"])
            self.value_fit.load_state_dict(state["value_fit"])
            self.reward_scaler.moments.load_state_dict(state["reward_moments"])
            local = state["processes"][self.group.rank]
            self.collector.load_state_dict(local["collector"])
            self.reward_scaler.returns.copy_(local["reward_returns"])
            self.fit_generator.set_state(local["fit_generator"])
            self.fisher_generator.set_state(local["fisher_generator"])
        except (KeyError, RuntimeError, TypeError) as error:
            first_line = str(error).splitlines()[0]
            raise CheckpointError(f"{path}: does not fit this config ({first_line})") from error
        for name, value in state["counters"].items():
            setattr(self, name, value)
        for window, saved in zip(
            (self.recent_returns, self.recent_lengths, self.recent_successes), state["recent"], strict=True
        ):
            window.extend(saved)

    def close(self) -> None:
        """Frees environments, files and the process group; may be called twice."""
        self.env.close()
        if self.writer is not None:
            self.writer.close()
        if self.group.leads:
            self._lock.release()
        leave_group(self.group)


def standardize(advantage: Tensor, group: Group | None = None) -> Tensor:
    """(Â − mean) / std over all samples of all processes; zeros if all are equal.

    "Equal" allows for rounding: a std below 1e-6 of the largest |Â| is no signal, and dividing by it would only blow up
    noise.
    """
    all_sum = (group or Group()).all_sum
    wide = advantage.double()
    total, count = all_sum(torch.stack([wide.sum(), wide.new_tensor(float(len(wide)))])).tolist()
    centred = wide - total / count
    square, largest = all_sum(torch.stack([centred.square().sum(), wide.abs().max()])).tolist()
    std = math.sqrt(square / count)
    if std <= 1e-6 * largest:
        return torch.zeros_like(advantage)
    return (centred / std).to(advantage.dtype)


def resolve_device(name: str) -> torch.device:
    """`auto` takes a GPU if there is one.

    Raises:
        UserError: a GPU is asked for and there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device {name}: no CUDA GPU is available; use device cpu or auto")
    return torch.device(name)


@contextmanager
def _catch_signals() -> Iterator[list[signal.Signals]]:
    """Collects stop signals in a list instead of dying; a second SIGINT raises KeyboardInterrupt at once."""
    received: list[signal.Signals] = []

    def note(number: int, frame: object) -> None:
        received.append(signal.Signals(number))
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    caught = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    try:
        previous = [signal.signal(number, note) for number in caught]
    except ValueError:  # not the main thread: signals are somebody else's business
        yield received
        return
    try:
        yield received
    finally:
        for number, handler in zip(caught, previous, strict=True):
            signal.signal(number, handler)


def _mean(values: deque[float]) -> float | None:
    return statistics.fmean(values) if values else None
