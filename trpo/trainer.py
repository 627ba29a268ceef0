"""Wires everything together: the training loop, its evaluations and its files."""

from __future__ import annotations

import contextlib
import copy
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trpo import native
from trpo.agent import Agent, UpdateReport
from trpo.batch import Rollout
from trpo.collector import Collector, Episodes
from trpo.config import Config
from trpo.config.difference import config_difference, same_episodes, same_evaluations
from trpo.config.file import dump_config
from trpo.config.schedule import options_at
from trpo.envs import make_envs
from trpo.envs.contract import NEW_EPISODES, BatchEnv, check_batch_env
from trpo.envs.shard import restart_seed
from trpo.envs.space_data import encode_observation_space, encode_space
from trpo.errors import CheckpointError, EnvError, TrainingError, UserError, gist, memory_needed
from trpo.evaluation import Evaluation, check_environment
from trpo.evaluation.video import try_recording
from trpo.natural_gradient import Outcome, StepReport
from trpo.run.autosave import Autosave
from trpo.run.checkpoint import CheckpointStore, checkpoint_paths
from trpo.run.diagnostics import RecentEpisodes, update_metrics
from trpo.run.directory import RunDirectory, RunLock
from trpo.run.evaluations import Evaluations
from trpo.run.messages import Messages
from trpo.run.metric_files import CsvTable
from trpo.run.metrics import EVALUATIONS_FILE, MetricsWriter
from trpo.run.record import changes_since
from trpo.run.remarks import remarks
from trpo.run.saved_policy import load_starting_policy
from trpo.run.state_tree import encode
from trpo.runtime.device import exact_convolutions, training_device
from trpo.runtime.distributed import join_group, leave_group
from trpo.runtime.random_streams import stream_seed, torch_generator
from trpo.runtime.signals import caught_signals
from trpo.runtime.timers import PhaseTimers

FIXED = {  # settings of a run for good
    "batch_size": "whose schedules and end are counted in updates",
    "name": "whose directory has it",
    "seed": "whose random streams go on",
}
COUNTERS = ("env_steps", "updates", "elapsed_s", "skipped_updates", "nonfinite_in_a_row")


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a training run left behind."""

    directory: Path
    env_steps: int
    # Of the last policy, in the leading process, if this call reached the end of the run; else None.
    evaluation: Evaluation | None
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
        start_from: a saved policy, or a run that has one, to begin a new run with; V is new all the same.
        console: show progress.
        env: environments made by hand, as many as this process's share, in place of those `config.env` describes;
            the evaluations are still of `config.env`. They are closed with the trainer.
        make_agent: called with what `Agent` takes, for a learner of your own, such as a subclass. Whoever goes on with
            its checkpoints has to give it again.
        on_update: called in every process after each update, with this trainer and the update's report: after the
            update's metrics and any evaluation that was due (except the run's last) are written, before a checkpoint
            that is due. True, from any process, stops the run as a signal would. What it raises ends the run, with a
            checkpoint if there is one process only.

    Attributes:
        options: what every reset is given beside `env.options`, and over them: for a curriculum that follows what the
            policy can do, from `on_update`. Those of the leading process count. Checkpoints hold them: what JSON can
            hold, and arrays. Evaluations are of `env.options`.
    """

    def __init__(
        self,
        config: Config,
        *,
        root: str | Path = "runs",
        resume: str | Path | None = None,
        start_from: str | Path | None = None,
        console: bool = True,
        env: BatchEnv | None = None,
        make_agent: Callable[..., Agent] = Agent,
        on_update: Callable[[Trainer, UpdateReport], bool | None] | None = None,
    ):
        if env is not None:
            check_batch_env(env, config.env.info)
        self.config = config
        self._make_agent = make_agent
        self.on_update = on_update
        self.device = training_device(config)
        self.env_steps = 0
        self.updates = 0
        self.elapsed_s = 0.0
        self.skipped_updates = 0
        self.nonfinite_in_a_row = 0
        self.recent = RecentEpisodes(config.env.info)
        self.options: dict[str, Any] = {}
        self._told_options = False
        self.env = env
        self._closed = False
        self.writer: MetricsWriter | None = None
        self._lock: RunLock | None = None
        if resume is not None and start_from is not None:
            raise UserError(f"a run that goes on has a policy already: {start_from} is for new ones")
        self._origin = None if start_from is None else load_starting_policy(start_from, config)
        # Some simulators change the working directory.
        root, resume = Path(root).absolute(), None if resume is None else Path(resume).absolute()
        self.group = join_group(self.device)
        self.messages = Messages(self.group)
        try:
            with memory_needed():
                self._build()
            self._open_run(root, resume, console)
        except BaseException:
            self.messages.abandon()
            self.close()
            raise

    def _build(self) -> None:
        config = self.config
        shard = self.group.shard(config.env.num_envs)
        if shard.start == shard.stop:
            raise UserError(f"env.num_envs {config.env.num_envs} is less than the {self.group.size} processes")
        if config.evaluation.video and self.group.leads:
            try_recording(config.env.for_evaluation)
        self._seeds = [stream_seed(config.seed, "environments", i) for i in range(shard.start, shard.stop)]
        self._by_hand = self.env is not None
        if self.env is None:
            self.env = make_envs(config.env, self._seeds, device=self.device, on_warning=self.messages.warn)
        env = self.env
        self._tell_options()
        self._restorable = env.exact_resume
        if env.num_envs != len(self._seeds):
            raise UserError(f"{env.num_envs} environments were given; env.num_envs asks for {len(self._seeds)} here")
        self.action_space = env.single_action_space
        self.observation_space = getattr(env, "unflattened_observation_space", None)  # one made by hand may lack it
        self.agent = self._make_agent(
            config,
            env.single_observation_space if self.observation_space is None else self.observation_space,
            env.single_action_space,
            num_envs=env.num_envs,
            group=self.group,
            device=self.device,
        )
        if self.group.leads and (self._by_hand or config.env.for_evaluation != config.env):
            check_environment(self.agent.policy, config.env, self.action_space)
        if self._origin is not None:
            self._origin.copy_to(self.agent.policy, config, self.action_space)
        self.collector = Collector(
            env,
            self.agent.policy,
            config.rollout_length,
            generator=torch_generator(config.seed, "actions"),
            noise_exponent=config.policy.noise_exponent,
            shard=shard,
            total_envs=config.env.num_envs,
            staggered=getattr(env, "staggered", False),
            info=config.env.info,
        )
        self.group.assert_equal(self.agent.policy.theta.vector, "the new policy")

    def _open_run(self, root: Path, resume: Path | None, console: bool) -> None:
        """Creates or opens the run directory, and takes up its newest checkpoint. Only rank 0 writes."""
        if self.group.leads:
            self.run = RunDirectory.open(resume) if resume else RunDirectory.create(root, self.config)
            self._lock = self.run.lock()
        directory = self.group.broadcast(str(self.run.path) if self.group.leads else None)
        if not self.group.leads:
            self.run = RunDirectory.open(Path(directory))
        warn = self.messages.warn if self.group.leads else lambda _: None  # all look at the same checkpoints
        store = CheckpointStore(self.run.checkpoints, keep=self.config.checkpoint.keep, on_warning=warn)
        self.autosave = Autosave(store, self.config.checkpoint, self.messages)
        self.evaluations = Evaluations(
            self.config,
            self.run,
            self.messages,
            action_space=self.action_space,
            observation_space=self.observation_space,
        )
        resumed, changed = resume is not None, list[str]()
        if resumed:
            found = store.newest()
            if found is None:
                raise CheckpointError(f"{resume}: no valid checkpoint to resume from; start a new run")
            changed = self._load_state(*found)
        self.messages.gather()
        if self.group.leads:
            self.writer = self._open_files(console, resumed=resumed)
        self.messages.open(self.writer)
        if self.writer is not None:
            if changed or not resumed:
                self.writer.add_text("config", f"```yaml\n{dump_config(self.config)}```")
            if changed:
                self._record_changes(changed)
            if resumed and self.updates < self.config.updates:
                self.run.set_final_aside()
            if self._origin is not None:
                self.messages.say(f"starts from {self._origin.path}, a policy of {self._origin.config.env.id}")
            for note in self._notes(resumed=resumed):
                self.messages.note(note)

    def _open_files(self, console: bool, *, resumed: bool) -> MetricsWriter:
        if resumed and self.updates == self.config.updates and not self._is_finished():
            # It was cut short amid its last evaluation, which is about to be written again.
            with contextlib.suppress(OSError):  # the writer, next, says it better
                CsvTable(self.run.path / EVALUATIONS_FILE, resume_step=self.env_steps - 1).close()
        return MetricsWriter(
            self.run.path,
            total_steps=self.config.updates * self.config.batch_size,
            console=console,
            resume_step=self.env_steps if resumed else None,
        )

    def _record_changes(self, changed: list[str]) -> None:
        """Of settings, by a run that goes on, in its files."""
        self.run.change_config(self.config)
        self.messages.say(f"goes on from {self.env_steps} steps with other settings: {'; '.join(changed)}")
        if any(line.startswith("total_steps:") for line in changed):
            bound = self.agent.kl_bound(self.progress)
            self.messages.note(f"schedules run to the new end; the KL of the next update may be {bound:.3g}")
        if self.evaluations.best_return == -math.inf and self.run.best.is_dir():
            self.messages.note("evaluations are of another task from now on, and the first of them replaces best/")

    def _notes(self, *, resumed: bool) -> Iterator[str]:
        """What one may not expect, to be said before the first update."""
        if resumed:
            yield from changes_since(self.run.meta_file, self.device)
        if self.options:
            yield f"resets are given {self.options} over env.options, as on_update had set"
        yield from remarks(self.config, self.agent.policy, self.action_space, new=not resumed)
        if not self._restorable:
            yield "this environment backend cannot be restored to the bit; a resumed run starts new episodes"

    def train(self, *, max_updates: int | None = None) -> RunResult:
        """Trains to the end (or for `max_updates` more updates), then saves, evaluates the last policy and closes.

        Once only: to go on, make another trainer with `resume`.

        SIGTERM, SIGINT and SIGUSR1 finish the update under way, save a checkpoint and return; a second SIGINT
        interrupts at once.

        Raises:
            TrainingError: numerics or saving failed too often in a row.
            EnvError: an environment failed.
        """
        if self._closed:
            raise RuntimeError(f"this trainer is closed; go on with Trainer(config, resume={str(self.run)!r})")
        last = self.config.updates if max_updates is None else min(self.config.updates, self.updates + max_updates)
        with contextlib.closing(self), self.torch_for_training(), self._errors_logged():
            if self._is_finished():
                self.messages.say("this run is finished already; to go on, raise total_steps")
                return RunResult(self.run.path, self.env_steps, None)
            with caught_signals() as received:
                stop: signal.Signals | bool = False  # the same in all processes, whichever was told
                while self.updates < last and not stop:
                    report = self.iteration()
                    told = self._told_to_stop(report)
                    if self.updates < last:  # `_finish` saves after the last one
                        self._save_if_due(report)
                    reasons = self.group.gather_objects(received[0] if received else told)
                    stop = next(filter(None, reasons), False)
                    del report  # whose batch would lie beside the next one
                return self._finish(stop if isinstance(stop, signal.Signals) else None)

    def record(self, metrics: Mapping[str, float]) -> None:
        """Numbers of your own for TensorBoard and `recorded.csv`, at the present step, from `on_update`.

        Only the leading process's numbers are written.

        Raises:
            RuntimeError: the run has ended, and with it what they would be written to.
        """
        if self._closed:
            raise RuntimeError("this trainer is closed: record from on_update")
        if self.writer is not None:
            self.writer.write_recorded(metrics, env_steps=self.env_steps)

    @contextlib.contextmanager
    def _errors_logged(self) -> Iterator[None]:
        """Logs the error that ends the run."""
        try:
            yield
        except Exception as error:
            if self.writer is not None:
                self.writer.failure(error)
                if (isinstance(error, EnvError) or self.group.size > 1) and checkpoint_paths(self.run.checkpoints):
                    resume = self.run.to_resume
                    self.messages.say(f"go on from the newest checkpoint with {resume}; its log.txt has the traceback")
            raise

    @contextlib.contextmanager
    def torch_for_training(self) -> Iterator[None]:
        """Within, torch has the threads of an update, and convolutions are exact; afterwards it is as it was."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.agent.torch_threads)
        try:
            with exact_convolutions(self.device), native.spare_threads(self.agent.threads - self.agent.torch_threads):
                yield
        finally:
            torch.set_num_threads(before)

    @property
    def evaluation(self) -> Evaluation | None:
        """The latest one, in the leading process; None before the first, or the first of another task."""
        return self.evaluations.latest

    @property
    def best_return(self) -> float:
        """Mean return of the policy in `best/`; −∞ before there is one of this task."""
        return self.evaluations.best_return

    def _is_finished(self) -> bool:
        return self.updates == self.config.updates and self.evaluations.has_last(self.env_steps)

    def iteration(self) -> UpdateReport:
        """One rollout and update, written down, and the evaluation after it if that is due; no checkpoint.

        To be called within `torch_for_training`.
        """
        if self._closed or self.updates == self.config.updates:
            raise RuntimeError("this trainer is closed" if self._closed else "the run is at its end")
        started = time.perf_counter()
        timers = PhaseTimers()
        self.agent.set_std(self.progress)
        with timers("rollout"):
            rollout, episodes = self._collect()
        if self.updates == 0:
            self._check_policy_is_still(rollout)
        learns = self.env_steps >= self.config.learning_starts
        report = self.agent.update(rollout, progress=self.progress, timers=timers, policy_learns=learns)
        for part in self.group.gather_objects(episodes):
            self.recent.add(part)

        self.env_steps += report.transitions
        self.updates += 1
        duration = time.perf_counter() - started
        self.elapsed_s += duration
        self._note_outcome(report.step)
        if report.fit.nonfinite:
            self.messages.say(f"update {self.updates}: the value fit met a non-finite loss or gradient and was undone")
        if self.writer is not None:
            metrics: dict[str, float | None] = {
                **self.recent.metrics(),
                "time/fps": report.transitions / duration,
                "time/iterations": self.updates,
                "time/time_elapsed": self.elapsed_s,
                "time/total_timesteps": self.env_steps,
                **{f"time/{phase}_s": seconds for phase, seconds in timers.pop().items()},
                "train/n_updates": self.updates,
                **update_metrics(report),
                "trust_region/skipped_updates": self.skipped_updates,
            }
            self.writer.write(metrics, env_steps=self.env_steps)
        self._give_up_if_broken(report.step)
        if self.updates < self.config.updates and self._is_due(self.config.evaluation.every_steps, report):
            self._evaluate(self.config.evaluation.episodes)  # `_finish` does so after the last one
        return report

    def _tell_options(self) -> None:
        """Resets from now on are given the options of the update to come."""
        self.options = self.group.broadcast(self.options)
        options = {**options_at(self.config.env.options, self.progress), **self.options}
        if not options and not self._told_options:
            return
        set_options = getattr(self.env, "set_options", None)
        if set_options is None and self._by_hand:
            if not self.options:
                return  # those of the config are for evaluations
            raise UserError(f"trainer.options: resets of {type(self.env).__name__} take none; give it set_options(…)")
        if set_options is None:
            raise UserError(
                f"env.options: resets of {type(self.env).__name__} take none; leave them out, or set env.backend to "
                "gymnasium"
            )
        set_options(copy.deepcopy(options))  # as they are now, whatever `on_update` does with them
        self._told_options = True

    def _collect(self) -> tuple[Rollout, Episodes]:
        """A rollout; where an environment fails what was trained before is saved, to go on from with new episodes."""
        try:
            self._tell_options()
            return self.collector.collect()
        except Exception:
            if self.group.size == 1 and self.env_steps > self.autosave.saved_at_step:
                self._save_checkpoint(episodes=False)
            raise

    def _told_to_stop(self, report: UpdateReport) -> bool:
        """By the caller, who has a look at the update."""
        if self.on_update is None:
            return False
        before = copy.deepcopy(self.options)
        with self._saved_on_error():
            try:
                answer = self.on_update(self, report)
            finally:
                if unfit := _unfit(self.options):
                    self.options = before  # for a checkpoint, whatever it raised
            if unfit:
                raise UserError(f"trainer.options are not what a checkpoint can hold: {unfit}")
            if not isinstance(answer, bool | np.bool_ | None):
                raise TypeError(f"on_update returned {answer!r}: True stops the run, False or None lets it go on")
        return bool(answer)

    @contextlib.contextmanager
    def _saved_on_error(self) -> Iterator[None]:
        """Between updates: saves what has been trained before an error ends the run."""
        try:
            yield
        except Exception:
            if self.group.size == 1:  # others would not come to a checkpoint of all
                self._save_checkpoint()
            raise

    @property
    def progress(self) -> float:
        """Where the next update is between the first (0) and the last one (1)."""
        return min(1.0, self.updates / max(1, self.config.updates - 1))

    def _check_policy_is_still(self, rollout: Rollout) -> None:
        """At start-up: what acted is what is updated, so that the ratio is 1 and the KL 0 at θ_old."""
        if self.collector.policy is not self.agent.policy:
            raise RuntimeError(
                "agent.policy was replaced after the collector was made; policy.build_policy is where to build your own"
            )
        moved = self.collector.changed_actions(rollout)
        if moved > 0.01:  # rounding may flip a discrete action now and then
            raise RuntimeError(f"the policy moved between rollout and update: {moved:.1%} of its actions changed")

    def _note_outcome(self, step: StepReport) -> None:
        if step.accepted or step.outcome is Outcome.RESTED:
            self.nonfinite_in_a_row = 0
            return
        self.skipped_updates += 1
        self.messages.say(f"update {self.updates} left the policy unchanged: {step.reason}")
        self.nonfinite_in_a_row = self.nonfinite_in_a_row + 1 if step.numerics_failed else 0

    def _give_up_if_broken(self, step: StepReport) -> None:
        if self.nonfinite_in_a_row >= self.config.natural_gradient.abort_after:
            self._save_checkpoint()  # none of these updates moved the policy, so that what came before is all there
            met = f"{self.nonfinite_in_a_row} updates in a row met NaN, infinity or negative curvature"
            raise TrainingError(
                f"{met} (last: {step.reason}); try a smaller max_kl or learning rate, or dtype float64, with "
                f"{self.run.to_resume} --set KEY=VALUE"
            )

    def _is_due(self, every: int, latest: UpdateReport) -> bool:
        """Whether the latest update passed a multiple of so many steps."""
        return every > 0 and self.env_steps // every > (self.env_steps - latest.transitions) // every

    def _save_if_due(self, latest: UpdateReport) -> None:
        due = self._is_due(self.config.checkpoint.every_steps, latest)
        if due or self.group.broadcast(self.autosave.is_late):  # clocks differ
            self._save_checkpoint()

    def _evaluate(self, episodes: int) -> Evaluation | None:
        """Evaluates on rank 0 and keeps the policy if it is the best so far."""
        if self.writer is None:
            return None
        started = time.perf_counter()
        with self._saved_on_error():
            result = self.evaluations.evaluate(self.collector.acting, episodes=episodes, env_steps=self.env_steps)
        self.elapsed_s += time.perf_counter() - started
        self.writer.write_evaluation(result.metrics(), env_steps=self.env_steps)
        self.evaluations.keep_if_best(result, self.agent.policy, env_steps=self.env_steps)
        return result

    def _finish(self, stopped_by: signal.Signals | None) -> RunResult:
        self._save_checkpoint()
        evaluation = None
        if stopped_by is None and self.updates == self.config.updates:
            evaluation = self._evaluate(self.config.evaluation.final_episodes)
            if evaluation is not None:
                self.evaluations.keep_last(evaluation, self.agent.policy, env_steps=self.env_steps)
            self._save_checkpoint()  # once more, with what the last policy returned, for a run that is prolonged
        else:
            why = stopped_by.name if stopped_by else "its caller"
            self.messages.say(f"stopped by {why} at {self.env_steps} steps; go on with {self.run.to_resume}")
        return RunResult(self.run.path, self.env_steps, evaluation, stopped_by)

    def _save_checkpoint(self, *, episodes: bool = True) -> None:
        """`episodes`: whether the running ones can go on."""
        self.group.assert_equal(self.agent.policy.theta.vector, "the policy")
        self.group.assert_equal(self.agent.value.theta.vector, "the value function")
        self.autosave.save(self._state(episodes), env_steps=self.env_steps, leads=self.group.leads)

    def _state(self, episodes: bool) -> dict[str, Any]:
        assert self.env is not None
        local = {"collector": self.collector.state_dict(episodes), "agent": self.agent.local_state_dict()}
        return {
            "config": self.config.model_dump(mode="json", by_alias=True),
            "observation_space": encode_observation_space(self.observation_space),
            "action_space": encode_space(self.action_space),
            "agent": self.agent.state_dict(),
            "counters": {
                **{name: getattr(self, name) for name in COUNTERS},
                "best_return": self.evaluations.best_return,
            },
            "options": self.options,
            "evaluation": self.evaluation and asdict(self.evaluation),
            "recent": self.recent.state_dict(),
            "processes": self.group.gather_objects(local),
        }

    def _load_state(self, path: Path, state: dict[str, Any]) -> list[str]:
        """Takes up a checkpoint; the settings that differ from those it was trained with."""
        changed: list[str] = []
        try:
            saved = Config.model_validate(state["config"])
            changed = config_difference(saved, self.config)
            for key, why in FIXED.items():
                if getattr(saved, key) != getattr(self.config, key):
                    raise UserError(f"{key} cannot change within a run, {why}; go on without it, or start a new run")
            if len(state["processes"]) != self.group.size:
                problem = f"saved by {len(state['processes'])} processes, resumed with {self.group.size}; use as many"
                raise CheckpointError(f"{path}: {problem}")
            self._load_learner(state, saved)
            if changed and self._is_finished():
                # Nothing would be trained with them, and the record would say that all was.
                given = f"raise total_steps too, to train on with {'; '.join(changed)}"
                raise UserError(f"{self.run} is finished; {given}")
            if self.updates > self.config.updates:
                raise UserError(f"total_steps {self.config.total_steps}: the run has taken {self.env_steps} already")
            self._load_episodes(state["processes"][self.group.rank], saved)
            return changed
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            why = "; ".join([gist(error), *changed])
            raise CheckpointError(f"{path}: does not fit this config ({why})") from error

    def _load_learner(self, state: dict[str, Any], saved: Config) -> None:
        """What is the same on all processes: what was learned, and what is known of it."""
        self.agent.load_state_dict(state["agent"])
        for name in COUNTERS:
            setattr(self, name, state["counters"][name])
        if same_evaluations(saved, self.config):
            latest = state["evaluation"] and Evaluation(**state["evaluation"])
            self.evaluations.go_on(latest, state["counters"]["best_return"])
        self.options = state["options"]
        self.recent.load_state_dict(state["recent"])
        self.autosave.saved_at_step = self.env_steps

    def _load_episodes(self, local: dict[str, Any], saved: Config) -> None:
        """What is this process's own: running episodes, unless they cannot go on, and random streams."""
        collector = local["collector"]
        if collector["env"] is None:
            self._begin_anew("an environment failed after this checkpoint")
        elif not (same_episodes(saved, self.config) or self._by_hand):
            collector = {**collector, "env": None}
            self._begin_anew("the environment is another one")
        self._tell_options()
        self.collector.load_state_dict(collector)  # first: it shows whether episodes go on
        self.agent.load_local_state_dict(local["agent"], new_episodes=not self.collector.goes_on)

    def _begin_anew(self, why: str) -> None:
        """New episodes, not those that the run began with, where those of a checkpoint cannot go on."""
        assert self.env is not None
        if not self._by_hand:
            seeds = [restart_seed(seed, self.env_steps) for seed in self._seeds]
            self.env.close()
            self.env = make_envs(self.config.env, seeds, device=self.device, on_warning=self.messages.warn)
            self._tell_options()
            self.collector.begin_anew(self.env)
        self.messages.warn(NEW_EPISODES.format(why))

    def close(self) -> None:
        """Frees environments, files and the process group; may be called twice."""
        self._closed = True
        with contextlib.ExitStack() as resources:  # last in, first out; each whatever another raises
            resources.callback(leave_group, self.group)
            self.group = replace(self.group, joined=False)
            if self._lock is not None:
                resources.callback(self._lock.release)
            if self.writer is not None:
                resources.callback(self.writer.close)
            if self.env is not None:
                resources.callback(self.env.close)


def _unfit(options: object) -> str | None:
    """Why a checkpoint cannot hold these; None if it can."""
    if not isinstance(options, dict):
        return f"they are {options!r}, no dict"
    try:
        encode(options, "/options", {})
    except (TypeError, ValueError) as error:
        return str(error)
    return None
