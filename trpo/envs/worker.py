"""One worker process: the parent's handle (`Worker`) and what the process runs (`main`), the two ends of one protocol.

A worker is a plain new interpreter, started by `subprocess` rather than by `multiprocessing`:
- fork copies CUDA contexts and the locks of other threads; spawn and forkserver import the caller's `__main__` again,
  and with it torch: seconds and 200 MB a worker, and a script without an `if __name__` guard starts itself anew;
- it gets a session of its own, so that signals to the trainer's process group never reach it, not even while it starts;
- the trainer is its parent, so that the kernel can tell it of the trainer's death (with forkserver it is not).
Arrays live in anonymous shared memory, which has no name that a killed process could leave behind. The pipe carries
commands and answers; exceptions travel as text, since many do not survive pickling.

The protocol: the parent sends `(command, payload)`, the worker answers `("ok", result)` or `("error", Failure)`.
Numpy and Gymnasium only, no torch, to keep worker processes light.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import pickle
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import gymnasium

from trpo.config import EnvConfig
from trpo.envs.shard import EnvShard
from trpo.envs.step_buffers import StepBuffers
from trpo.errors import EnvError

_BOOTSTRAP = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from trpo.envs.worker import main; main()"
_STOP_S = 2.0  # how long a worker asked to stop may take
_LONGEST_POLL_MS = 2**31 - 1  # the kernel takes no more: 24 days
_PARENT_POLL_S = 0.5  # how often a worker looks whether its parent lives, where the kernel does not tell
_PR_SET_PDEATHSIG = 1


class WorkerLost(EnvError):
    """A worker died or hung, so that its environments are gone."""


class WorkerTraceback(Exception):
    """The traceback of an exception in a worker, shown as the cause of the `EnvError` raised for it."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


@dataclass(frozen=True, slots=True)
class Failure:
    """An exception in a worker, as text."""

    message: str
    traceback: str


class Worker:
    """The parent's handle of one worker process, which owns environments start … stop - 1.

    Args:
        config: The environment.
        seeds: One per environment of this worker.
        start: Index of its first environment in the batch.
        memory: Descriptor of shared memory, to be sized before `map_memory` is sent.
    """

    def __init__(self, config: EnvConfig, seeds: Sequence[int], start: int, memory: int) -> None:
        self.start, self.stop = start, start + len(seeds)
        self._connection, theirs = Pipe()
        self._answers = select.poll()  # once for all waits: `Connection.poll` builds a selector for each
        self._answers.register(self._connection.fileno(), select.POLLIN)
        # One thread each: as many workers as cores are running already.
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _BOOTSTRAP, json.dumps(sys.path), *map(str, self._arguments(theirs, memory))],
                pass_fds=(theirs.fileno(), memory),
                env=threads | dict(os.environ),
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self.send("start", (config, list(seeds), start, _registration(config.id)))

    @staticmethod
    def _arguments(theirs: Connection, memory: int) -> tuple[int, int, int, int]:
        # The kernel ties a child to the *thread* that started it: only the main thread is sure to outlive the worker.
        tied = threading.current_thread() is threading.main_thread()
        return theirs.fileno(), memory, os.getpid(), int(tied)

    @property
    def name(self) -> str:
        """The environments it owns, for messages."""
        last = self.stop - 1
        return f"environment {last}" if last == self.start else f"environments {self.start} to {last}"

    def send(self, command: str, payload: Any = None) -> None:
        """Sends a command; that the worker is dead shows in `receive`."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._connection.send((command, payload))

    def receive(self, deadline: float, allowed_s: float) -> Any:
        """The answer to the last command.

        Args:
            deadline: Monotonic time until which to wait.
            allowed_s: What the worker was allowed in all, for the message.

        Raises:
            WorkerLost: The worker died, or gave no answer by the deadline.
            EnvError: What went wrong in the worker, with its traceback as cause.
        """
        try:
            left_ms = 1000 * max(0.0, deadline - time.monotonic())
            if not self._answers.poll(min(left_ms, _LONGEST_POLL_MS)):
                raise WorkerLost(
                    f"the worker process of {self.name} gave no answer within {allowed_s:g} s: fix the environment "
                    "that hangs, or raise env.timeout_s"
                )
            status, result = self._connection.recv()
        except (EOFError, ConnectionResetError) as error:
            raise WorkerLost(f"the worker process of {self.name} {self._end()}") from error
        if status == "error":
            raise EnvError(result.message) from WorkerTraceback(result.traceback)
        return result

    def _end(self) -> str:
        try:
            code = self.process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            return "closed its connection"
        if code < 0:
            hint = " (often: out of memory; lower env.num_envs)" if code == -signal.SIGKILL else ""
            return f"was killed by {signal.Signals(-code).name}{hint}"
        return f"ended with exit code {code}"

    def ask_to_stop(self) -> None:
        """Lets the worker close its environments and end; `kill` waits for it no longer than 2 s in all."""
        self.send("close")

    def kill(self, grace_s: float = 0.0) -> None:
        """Ends the process, after `grace_s` by force, and frees its handle; may be called again."""
        try:
            self.process.wait(grace_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._connection.close()


def stop_all(workers: list[Worker], *, politely: bool = True) -> None:
    """Ends all workers and empties the list, within 2 s."""
    if politely:
        for worker in workers:
            worker.ask_to_stop()
    deadline = time.monotonic() + (_STOP_S if politely else 0.0)
    while workers:
        workers.pop().kill(max(0.0, deadline - time.monotonic()))


def shared_memory() -> int:
    """Descriptor of an empty piece of anonymous shared memory, freed by the kernel with its last user."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("trpo-envs")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _registration(env_id: str) -> bytes | None:
    """What Gymnasium's registry here says of an id; None where no other process could import what it names."""
    try:
        return pickle.dumps(gymnasium.registry.get(env_id))
    except (pickle.PicklingError, AttributeError, TypeError):
        return None


def main() -> None:
    """Serves the parent until it asks to stop, or is gone."""
    connection, memory, parent, tied = Connection(int(sys.argv[2])), *map(int, sys.argv[3:6])
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)  # the parent decides when to stop
    _end_with_parent(parent, bool(tied))
    shard: _Served | None = None
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            command, payload = connection.recv()
            if command == "close":
                break
            try:
                if command == "start":
                    shard = _Served(memory, *payload)
                    answer: tuple[str, Any] = ("ok", shard.spaces)
                else:
                    assert shard is not None
                    answer = ("ok", getattr(shard, command)(*payload))
            except BaseException as error:  # SystemExit too: an environment that calls exit() is a failure to report
                answer = ("error", _failure(error))
            connection.send(answer)
    if shard is not None:
        shard.close()


class _Served(EnvShard):
    """The worker's shard, with the commands that only a worker has."""

    def __init__(
        self, memory: int, config: EnvConfig, seeds: Sequence[int], first_index: int, registration: bytes | None
    ) -> None:
        _register(config.id, registration)
        super().__init__(config, seeds, first_index)
        self._memory = memory

    def map_memory(self, num_envs: int) -> None:
        """Attaches this shard's rows of the shared buffers of `num_envs` environments."""
        memory = mmap.mmap(self._memory, StepBuffers.nbytes(self.spaces, num_envs))
        whole = StepBuffers.over(memory, self.spaces, num_envs)
        self.attach(whole.rows(self._first, self._first + len(self._envs)))


def _register(env_id: str, registration: bytes | None) -> None:
    if env_id in gymnasium.registry or ":" in env_id:
        return
    try:
        if registration is None:
            raise ImportError("its entry point is a local object")
        spec = pickle.loads(registration)
    except (AttributeError, ImportError) as error:
        raise EnvError(
            f"{env_id} is registered in a place that worker processes cannot import ({error}): move the environment "
            f"and its registration to a module and write env.id as `module:{env_id}`, or set env.backend to gymnasium"
        ) from error
    if spec is not None:
        gymnasium.registry[env_id] = spec


def _failure(error: BaseException) -> Failure:
    try:
        message = str(error) if isinstance(error, EnvError) else f"{type(error).__name__} in a worker: {error}"
    except Exception:
        message = f"{type(error).__name__} in a worker, whose text cannot be shown"
    return Failure(message, "".join(traceback.format_exception(error)))


def _end_with_parent(parent: int, tied: bool) -> None:
    """Lets this process end with its parent even where it hangs in an environment and reads no pipe."""
    if tied and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_PARENT_POLL_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
