"""Worker processes: what happens when they die, hang, fail or lose their parent."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

from trpo.config import EnvConfig
from trpo.envs import make_envs
from trpo.envs.workers import WorkerEnvs, restart_seed
from trpo.errors import EnvError
from trpo.runtime.cores import update_threads, worker_count

SEEDS = [20, 21, 22, 23]
ACTION = torch.zeros(4, 1, dtype=torch.int64)
GONE_S = 2.0  # what the design promises for workers whose trainer was killed

Maker = Callable[..., WorkerEnvs]


@pytest.fixture
def make() -> Iterator[Maker]:
    made: list[WorkerEnvs] = []

    def make(name: str = "Counting", *, workers: int = 2, settings: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        env_id = f"faulty_envs:{name}-v0"
        config = EnvConfig(id=env_id, backend="gymnasium-async", workers=workers, kwargs=kwargs, **(settings or {}))
        made.append(WorkerEnvs(config, SEEDS))
        return made[-1]

    yield make
    for envs in made:
        envs.close()


def processes(envs: WorkerEnvs) -> list[int]:
    """Process ids of the workers, from the observations of Counting environments."""
    return list(dict.fromkeys(envs.reset()[:, 2].int().tolist()))


def gone(pid: int) -> bool:
    """Whether a process has ended, waited for by its parent or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_until_gone(pids: list[int], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not all(map(gone, pids)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


class TestWorkers:
    def test_each_owns_a_contiguous_share_and_has_no_torch(self, make: Maker) -> None:
        envs = make(workers=3)
        obs = envs.reset()
        first = obs[:, 2].tolist()
        assert len(set(first)) == 3 and first[0] == first[1] and os.getpid() not in first
        assert not obs[:, 3].any()

    def test_never_more_workers_than_environments(self) -> None:
        assert worker_count(9, 4) == 4
        assert worker_count(2, 4) == 2
        assert 1 <= worker_count(0, 1000) <= (os.cpu_count() or 1)

    def test_processes_of_one_machine_share_its_cores(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
        for processes, workers, threads in [(1, 16, 4), (5, 3, 3), (1000, 1, 1)]:
            monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
            assert (worker_count(0, 1000), update_threads(0)) == (workers, threads)
            assert (worker_count(9, 1000), update_threads(9)) == (9, 9)

    @pytest.mark.parametrize(
        ("files", "workers"),
        [
            ({"cpu.max": "150000 100000\n"}, 2),
            ({"cpu.max": "max 100000\n"}, 8),
            ({"cpu.max": "10000 100000\n"}, 1),
            ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
            ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
            ({}, 8),
        ],
        ids=str,
    )
    def test_a_container_may_have_less_time_than_cores(
        self, files: dict[str, str], workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(text)
        monkeypatch.setattr("trpo.runtime.cores._CGROUP", tmp_path)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
        monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
        assert worker_count(0, 1000) == workers

    def test_an_id_registered_in_this_process_only(self) -> None:
        gymnasium.register("Elsewhere-v0", entry_point="faulty_envs:Counting")
        envs = WorkerEnvs(EnvConfig(id="Elsewhere-v0", workers=1), [0])
        assert envs.reset().shape == (1, 4)
        envs.close()

    def test_an_environment_that_no_other_process_can_import(self) -> None:
        class Here(gymnasium.Env[Any, Any]):
            pass

        gymnasium.register("Here-v0", entry_point=Here)
        with pytest.raises(
            EnvError, match=r"registered in a place that worker processes cannot import.*`module:Here-v0`"
        ):
            WorkerEnvs(EnvConfig(id="Here-v0", workers=1), [0])

    def test_needs_a_system_that_can_supervise(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("trpo.envs.workers.os.name", "nt")
        with pytest.raises(EnvError, match=r"set env.backend to gymnasium"):
            WorkerEnvs(EnvConfig(id="CartPole-v1"), [0])


class TestEnding:
    def test_close_leaves_no_process_and_no_descriptor(self, make: Maker) -> None:
        before = len(os.listdir("/proc/self/fd"))
        envs = make()
        pids = processes(envs)
        step = envs.step(ACTION)
        envs.close()
        envs.close()
        assert all(not Path(f"/proc/{pid}").exists() for pid in pids)  # waited for: not even zombies
        assert len(os.listdir("/proc/self/fd")) <= before + 1  # the memory itself lives as long as its tensors
        assert step.next_obs[:, 1].tolist() == [1.0] * 4
        with pytest.raises(EnvError, match="closed"):
            envs.step(ACTION)

    def test_workers_end_with_the_object(self) -> None:
        envs = make_envs(EnvConfig(id="faulty_envs:Counting-v0", backend="gymnasium-async", workers=1), SEEDS)
        pids = processes(envs)
        del envs
        gc.collect()
        assert wait_until_gone(pids, 0.0)

    def test_a_hung_worker_does_not_hold_up_close(self, make: Maker) -> None:
        envs = make("Faulty", fault="hang", seed=21, settings={"timeout_s": 0.5})
        pids = processes(envs)
        envs.step(ACTION)
        with pytest.raises(EnvError, match=r"environments 0 to 1 gave no answer within 0.5 s.*env.timeout_s"):
            envs.step(ACTION)
        assert wait_until_gone(pids, 0.0)

    def test_signals_to_the_trainer_do_not_end_workers(self, make: Maker) -> None:
        envs = make()
        pids = processes(envs)
        for pid in pids:
            assert os.getpgid(pid) != os.getpgid(0)  # what the terminal or a launcher sends to the group stays away
            os.kill(pid, signal.SIGINT)
            os.kill(pid, signal.SIGTERM)
        for _ in range(20):
            envs.step(ACTION)
        assert processes(envs) == pids

    def test_workers_of_a_killed_trainer_are_gone_even_if_busy(self) -> None:
        # No `if __name__` guard and no file: a script or notebook may be written like this.
        script = f"""
import sys, torch; sys.path.insert(0, {str(Path(__file__).parent)!r})
from trpo.config import EnvConfig
from trpo.envs import make_envs
kwargs = dict(fault="hang", seed=20, at=1)
envs = make_envs(EnvConfig(id="faulty_envs:Faulty-v0", backend="gymnasium-async", workers=2, kwargs=kwargs), {SEEDS})
print(*envs.reset()[::2, 2].int().tolist(), flush=True)
envs.step(torch.zeros(4, 1, dtype=torch.int64))
"""
        with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as trainer:
            assert trainer.stdout is not None
            pids = [int(word) for word in trainer.stdout.readline().split()]
            assert len(pids) == 2 and not any(map(gone, pids))
            trainer.kill()
        assert wait_until_gone(pids, GONE_S)


class TestFailures:
    def test_a_killed_worker_is_named_with_its_environments_and_signal(self, make: Maker) -> None:
        envs = make()
        pids = processes(envs)
        os.kill(pids[1], signal.SIGKILL)
        with pytest.raises(EnvError, match="worker process of environments 2 to 3 was killed by SIGKILL"):
            envs.step(ACTION)
        assert wait_until_gone(pids, 0.0)  # the healthy one is ended too

    def test_a_worker_that_ends_is_named_with_its_exit_code(self, make: Maker) -> None:
        envs = make("Faulty", fault="die", seed=23, at=1, workers=4)
        envs.reset()
        with pytest.raises(EnvError, match="worker process of environment 3 ended with exit code 3"):
            envs.step(ACTION)

    def test_an_environment_that_calls_exit_is_reported(self, make: Maker) -> None:
        envs = make("Faulty", fault="exit", seed=20, at=1)
        envs.reset()
        with pytest.raises(EnvError, match=r"environment 0, step 1 of its episode, raised SystemExit: 7 \("):
            envs.step(ACTION)

    def test_a_constructor_that_fails_in_one_worker(self, make: Maker, tmp_path: Path) -> None:
        with pytest.raises(EnvError, match=r"^environment [02]: .*RuntimeError: no licence found") as caught:
            make("FirstDiffers", marker=str(tmp_path / "built"))
        assert "in _make" in str(caught.value.__cause__)  # the worker's traceback

    def test_workers_whose_spaces_differ(self, make: Maker, tmp_path: Path) -> None:
        with pytest.raises(EnvError, match="have different action spaces"):
            make("FirstDiffers", marker=str(tmp_path / "built"), fails=False, workers=4)

    def test_an_interrupt_while_waiting_ends_the_workers(self, make: Maker) -> None:
        envs = make("Faulty", fault="hang", seed=20, at=1)
        pids = processes(envs)

        def interrupt(*_: Any) -> None:
            raise KeyboardInterrupt

        previous = signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(KeyboardInterrupt):
            envs.step(ACTION)
        signal.signal(signal.SIGALRM, previous)
        assert wait_until_gone(pids, 0.0)


class TestRestart:
    SETTINGS = {"on_worker_failure": "restart", "max_restarts": 1}  # noqa: RUF012

    def test_cut_episodes_are_truncated_and_not_valid(self, make: Maker) -> None:
        envs = make(settings=self.SETTINGS)
        pids = processes(envs)
        envs.step(ACTION)
        os.kill(pids[0], signal.SIGKILL)
        step = envs.step(ACTION)
        assert envs.restarts == 1
        assert step.valid.tolist() == [False, False, True, True]
        assert step.truncated.tolist() == [True, True, False, False]
        assert not step.terminated.any()
        assert step.reward.tolist() == [0.0, 0.0, 1.0, 1.0]
        assert step.next_obs[:, 1].tolist() == [1.0, 1.0, 2.0, 2.0]  # lost rows: the observation acted on
        assert step.reset_obs[:, 1].tolist() == [0.0, 0.0, 2.0, 2.0]  # lost rows: a new episode
        assert not {int(pid) for pid in step.reset_obs[:2, 2]} & set(pids)
        step = envs.step(ACTION)
        assert step.valid.all() and step.next_obs[:, 1].tolist() == [1.0, 1.0, 3.0, 3.0]

    def test_a_hung_worker_is_replaced(self, make: Maker) -> None:
        # The replacement has other seeds than the armed one, so it does not hang again.
        envs = make("Faulty", fault="hang", seed=22, settings={**self.SETTINGS, "timeout_s": 0.5})
        envs.reset()
        envs.step(ACTION)
        assert envs.step(ACTION).valid.tolist() == [True, True, False, False]
        assert envs.step(ACTION).valid.all()

    def test_no_more_often_than_allowed(self, make: Maker) -> None:
        envs = make(settings=self.SETTINGS)
        os.kill(processes(envs)[0], signal.SIGKILL)
        os.kill(int(envs.step(ACTION).reset_obs[0, 2]), signal.SIGKILL)
        with pytest.raises(EnvError, match=r"killed by SIGKILL.*env.max_restarts \(1\) is used up"):
            envs.step(ACTION)

    def test_new_seeds_derive_from_the_old_ones(self) -> None:
        envs = pendulum()
        kill_first_worker(envs)
        first = envs.reset()
        derived = int(np.random.SeedSequence([5, 1]).generate_state(1)[0])
        assert restart_seed(5, 1) == derived != restart_seed(5, 2)
        assert np.array_equal(first[0], gymnasium.make("Pendulum-v1").reset(seed=derived)[0])
        envs.close()

    def test_restarts_are_counted_over_a_resume(self) -> None:
        envs, resumed = pendulum(), pendulum()
        envs.reset()
        kill_first_worker(envs)
        cut = envs.step(torch.zeros(1, 1))
        assert torch.equal(resumed.load_state_dict(envs.state_dict()), cut.reset_obs)
        assert resumed.restarts == 1
        kill_first_worker(resumed)
        with pytest.raises(EnvError, match="is used up"):
            resumed.step(torch.zeros(1, 1))
        envs.close()


def pendulum() -> WorkerEnvs:
    return WorkerEnvs(EnvConfig(id="Pendulum-v1", workers=1, on_worker_failure="restart", max_restarts=1), [5])


def kill_first_worker(envs: WorkerEnvs) -> None:
    """For environments whose observations do not tell their process."""
    envs._workers[0].process.kill()
    envs._workers[0].process.wait()
