"""`WorkerEnvs`: Gymnasium environments stepped in supervised worker processes."""

from __future__ import annotations

import contextlib
import mmap
import os
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trpo.config import EnvConfig
from trpo.envs.contract import NEW_EPISODES, Step, check_env_count, native_actions
from trpo.envs.shard import check_same_spaces, restart_seed
from trpo.envs.spaces import ActionEncoding
from trpo.envs.step_buffers import EnvSpaces, StepBuffers
from trpo.envs.worker import Worker, WorkerLost, shared_memory, stop_all
from trpo.errors import EnvError
from trpo.runtime.cores import worker_count

_START_S = 60.0  # for imports and constructors, on top of env.timeout_s


class WorkerEnvs:
    """N Gymnasium environments in worker processes, each with a contiguous share of them; a `BatchEnv`.

    Numbers are the same as in-process, to the bit, whatever the number of workers. The same tensors come back from
    every `step`: views of the shared memory, valid until the next call. After any error all workers are ended.

    Attributes:
        restarts: How often a worker was replaced, over the whole run; more than `config.max_restarts` is an error.
            The episodes cut by it end as truncated, in rows that are not valid: what happened in them is not known.
    """

    def __init__(
        self, config: EnvConfig, seeds: Sequence[int], *, on_warning: Callable[[str], None] = lambda _: None
    ) -> None:
        self._on_warning = on_warning
        if os.name != "posix":
            raise EnvError("env.backend gymnasium-async needs Linux or macOS; set env.backend to gymnasium")
        self.num_envs = len(seeds)
        self.staggered = config.stagger
        self.device = torch.device("cpu")
        self.exact_resume = True
        self.restarts = 0
        self._interrupted = np.zeros(self.num_envs, bool)  # episode lost since the last step; to be told by the next
        self._config = config
        self._seeds = [int(seed) for seed in seeds]
        self._options: dict[str, Any] = {}
        self._memory = shared_memory()
        self._workers: list[Worker] = []
        # Ends the workers when this object is forgotten or the interpreter ends; holds no reference to self.
        self._end = weakref.finalize(self, _release, self._workers, self._memory)
        with self._ending_on_error():
            shares = np.array_split(np.arange(self.num_envs), worker_count(config.workers, self.num_envs))
            for share in shares:
                self._workers.append(self._start(int(share[0]), int(share[-1]) + 1))
            self._open_buffers(self._gather_spaces())

    def set_options(self, options: dict[str, Any]) -> None:
        """See `BatchEnv`."""
        self._options = options
        with self._ending_on_error():
            payloads = [(options,)] * len(self._workers)
            for worker, failure in self._run("set_options", self._config.timeout_s, payloads)[1]:
                self._replace(worker, failure)

    def reset(self) -> Tensor:
        """See `BatchEnv.reset`."""
        with self._ending_on_error():
            for worker, failure in self._run("reset", self._config.timeout_s)[1]:
                self._replace(worker, failure)
            self._interrupted[:] = False
        return self._step.reset_obs

    def step(self, action: Tensor) -> Step:
        """See `BatchEnv.step`."""
        with self._ending_on_error():
            buffers = self._buffers
            np.copyto(buffers.action, native_actions(self._encoding, action, self.num_envs))
            np.copyto(self._acted_in, buffers.reset_obs)
            np.logical_not(self._interrupted, out=buffers.valid)  # the others are stepped
            for worker, failure in self._run("step", self._config.timeout_s)[1]:
                self._replace(worker, failure)
            self._report_interrupted()
        return self._step

    def state_dict(self) -> dict[str, Any]:
        """See `BatchEnv.state_dict`; one entry per environment, the same whichever backend wrote it."""
        with self._ending_on_error():
            shares, lost = self._run("state_dict", self._config.timeout_s)
            while lost:
                for worker, failure in lost:
                    self._replace(worker, failure)
                shares, lost = self._run("state_dict", self._config.timeout_s)
        envs = [state for share in shares for state in share]
        return {"restarts": self.restarts, "interrupted": self._interrupted.copy(), "envs": envs}

    def load_state_dict(self, state: dict[str, Any]) -> Tensor:
        """See `BatchEnv.load_state_dict`."""
        envs = state["envs"]
        check_env_count(envs, self.num_envs)
        with self._ending_on_error():
            shares = [(envs[worker.start : worker.stop],) for worker in self._workers]
            # A step takes at most timeout_s, and this replays all steps of the longest share.
            steps = max(sum(len(env["actions"]) for env in share) for (share,) in shares)
            problem = next(
                filter(None, self._all("load_state_dict", self._config.timeout_s * (1 + steps), shares)), None
            )
            self.exact_resume = problem is None
            if problem is not None:
                self._on_warning(NEW_EPISODES.format(problem))
                self._all("begin_anew", self._config.timeout_s, shares)
        self.restarts = int(state.get("restarts", 0))
        self._interrupted[:] = state.get("interrupted", False) if self.exact_resume else False
        return self._step.reset_obs

    def close(self) -> None:
        """See `BatchEnv.close`."""
        self._end()

    @contextlib.contextmanager
    def _ending_on_error(self) -> Iterator[None]:
        # An interrupted exchange leaves answers in the pipes that the next command would take for its own.
        if not self._end.alive:
            raise EnvError("the environments are closed: make new ones")
        try:
            yield
        except BaseException:
            stop_all(self._workers, politely=False)
            self._end()
            raise

    def _start(self, start: int, stop: int) -> Worker:
        return Worker(self._config, self._seeds[start:stop], start, self._memory)

    def _gather_spaces(self) -> EnvSpaces:
        allowed_s = self._config.timeout_s + _START_S
        deadline = time.monotonic() + allowed_s
        found: list[EnvSpaces] = [worker.receive(deadline, allowed_s) for worker in self._workers]
        for worker, spaces in zip(self._workers, found, strict=True):
            check_same_spaces(found[0], spaces, 0, worker.start)
        return found[0]

    def _open_buffers(self, spaces: EnvSpaces) -> None:
        size = StepBuffers.nbytes(spaces, self.num_envs)
        os.truncate(self._memory, size)
        self._buffers = StepBuffers.over(mmap.mmap(self._memory, size), spaces, self.num_envs)
        self._step = Step.over(self._buffers)
        self._acted_in = self._buffers.reset_obs.copy()
        self._encoding = ActionEncoding.of(spaces.action)
        self.single_observation_space = spaces.observation
        self.unflattened_observation_space = spaces.unflattened
        self.single_action_space = spaces.action
        self._all("map_memory", self._config.timeout_s, [(self.num_envs,)] * len(self._workers))

    def _all(self, command: str, allowed_s: float, payloads: Sequence[tuple[Any, ...]]) -> list[Any]:
        """`_run` where none may be lost."""
        results, lost = self._run(command, allowed_s, payloads)
        for _, failure in lost:
            raise failure
        return results

    def _run(
        self, command: str, allowed_s: float, payloads: Sequence[tuple[Any, ...]] | None = None
    ) -> tuple[list[Any], list[tuple[Worker, WorkerLost]]]:
        """Sends a command to all workers, then waits for all: their results, and those lost with the reason."""
        for index, worker in enumerate(self._workers):
            worker.send(command, payloads[index] if payloads else ())
        deadline = time.monotonic() + allowed_s
        results, lost = [], []
        for worker in self._workers:
            try:
                results.append(worker.receive(deadline, allowed_s))
            except WorkerLost as failure:
                lost.append((worker, failure))
        return results, lost

    def _replace(self, worker: Worker, failure: WorkerLost) -> None:
        """Starts a new worker with fresh episodes in the place of a lost one, as often as the settings allow."""
        position = self._workers.index(worker)
        while True:
            self._workers[position].kill()
            if self._config.on_worker_failure == "fail":
                raise failure
            if self.restarts >= self._config.max_restarts:
                raise EnvError(f"{failure}; env.max_restarts ({self.restarts}) is used up") from failure
            self.restarts += 1
            self._on_warning(f"{failure}; restart {self.restarts} of {self._config.max_restarts}")
            for i in range(worker.start, worker.stop):
                self._seeds[i] = restart_seed(self._seeds[i], self.restarts)
            self._workers[position] = replacement = self._start(worker.start, worker.stop)
            try:
                self._begin(replacement)
                self._interrupted[worker.start : worker.stop] = True
                return
            except WorkerLost as again:
                failure = again

    def _begin(self, worker: Worker) -> None:
        commands = (("map_memory", (self.num_envs,)), ("set_options", (self._options,)), ("reset", ()))
        for command, payload in ((None, ()), *commands):
            if command is not None:
                worker.send(command, payload)
            allowed_s = self._config.timeout_s + _START_S
            worker.receive(time.monotonic() + allowed_s, allowed_s)

    def _report_interrupted(self) -> None:
        """Writes the rows of environments whose episode was lost with their worker; their new episodes have begun."""
        buffers, lost = self._buffers, self._interrupted
        buffers.next_obs[lost] = self._acted_in[lost]
        buffers.reward[lost] = 0.0
        buffers.terminated[lost] = False
        buffers.truncated[lost] = True
        buffers.valid[lost] = False
        buffers.success[lost] = np.nan
        buffers.info[lost] = np.nan
        lost[:] = False


def _release(workers: list[Worker], memory: int) -> None:
    stop_all(workers)
    os.close(memory)
