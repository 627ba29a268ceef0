"""The adapter of envpool: against a stand-in with its peculiarities everywhere, and against the package by
`pytest -m envpool` where it is installed. The oracle is Gymnasium, stepped by hand."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import fake_envpool
import gymnasium
import numpy as np
import pytest
import torch
from commands import config_for
from fake_envpool import FakePool
from gymnasium.spaces import Box, Discrete

from trpo.config import Config, EnvConfig, WrapperConfig
from trpo.config.file import load_config
from trpo.envs import make_envs
from trpo.envs.contract import BatchEnv
from trpo.errors import EnvError
from trpo.trainer import Trainer

SEEDS = [11, 7, 2**31 - 1]


def make(env_id: str, seeds: list[int] | None = None, **settings: Any) -> BatchEnv:
    return make_envs(
        EnvConfig(id=env_id, backend="envpool", **{"stagger": False} | settings), SEEDS if seeds is None else seeds
    )


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> list[FakePool]:
    """The stand-in in the place of the package; the pools made of it."""
    monkeypatch.setitem(sys.modules, "envpool", fake_envpool)
    monkeypatch.setattr(fake_envpool, "made", [])
    return fake_envpool.made


def random_actions(space: Any, steps: int, num_envs: int) -> torch.Tensor:
    """[T, N, A] as a policy would encode them; for a Box beyond its bounds too."""
    rng = np.random.default_rng(0)
    if isinstance(space, Discrete):
        return torch.from_numpy(rng.integers(0, space.n, (steps, num_envs, 1)))
    return torch.from_numpy(rng.uniform(-2, 2, (steps, num_envs, *space.shape)).astype(np.float32))


def native(space: Any, action: torch.Tensor) -> Any:
    """One environment's action [A] as Gymnasium takes it."""
    return int(action) if isinstance(space, Discrete) else action.numpy().clip(space.low, space.high)


class TestSteps:
    @pytest.mark.parametrize("env_id", ["CartPole-v1", "Hopper-v5", "Pendulum-v1"])
    def test_transitions_are_gymnasiums_and_the_rows_between_episodes_are_none(
        self, env_id: str, fake: list[FakePool]
    ) -> None:
        envs, singles = make(env_id), [gymnasium.make(env_id) for _ in SEEDS]
        last = [env.reset(seed=seed)[0] for env, seed in zip(singles, SEEDS, strict=True)]
        assert np.array_equal(envs.reset(), last)
        ended, resets = [False] * 3, 0
        for action in random_actions(envs.single_action_space, 450, 3):
            step = envs.step(action)
            assert step.reward.dtype == torch.float64
            assert torch.equal(step.reset_obs, step.next_obs)
            for i, env in enumerate(singles):
                assert bool(step.valid[i]) is not ended[i]
                if ended[i]:
                    last[i], resets = env.reset()[0], resets + 1
                    reward, terminated, truncated = 0.0, False, False
                else:
                    # In envpool's dtype: a control cost of float32 actions is a float32 sum.
                    last[i], reward, terminated, truncated, _ = env.step(native(fake[0].action_space, action[i]))
                assert np.array_equal(step.next_obs[i], last[i])
                assert float(step.reward[i]) == np.float32(reward)
                assert (bool(step.terminated[i]), bool(step.truncated[i])) == (terminated, truncated)
                ended[i] = terminated or truncated
        assert resets >= 6
        envs.close()

    def test_the_action_space_is_gymnasiums_and_the_actions_are_envpools(self, fake: list[FakePool]) -> None:
        envs = make("Hopper-v5")
        assert envs.single_action_space == gymnasium.make("Hopper-v5").action_space
        assert envs.single_action_space.dtype == np.float32 and fake[0].action_space.dtype == np.float64
        envs.reset()
        assert envs.step(torch.zeros(3, 3)).next_obs.dtype == torch.float64  # and the stand-in took them

    def test_seeds_belong_to_environments_whatever_the_split(self, fake: list[FakePool]) -> None:
        whole = make("CartPole-v1").reset()
        assert torch.equal(whole, torch.cat([make("CartPole-v1", [seed]).reset() for seed in SEEDS]))

    @pytest.mark.parametrize(("workers", "threads"), [(2, 2), (0, min(3, len(os.sched_getaffinity(0)))), (9, 3)])
    def test_workers_are_threads(self, workers: int, threads: int, fake: list[FakePool]) -> None:
        make("CartPole-v1", workers=workers)
        assert fake[0].num_threads == threads

    @pytest.mark.parametrize(
        ("workers", "cores", "usable", "pinned"),
        [(2, 2, {0, 1}, True), (1, 2, {0, 1}, False), (2, 4, {0, 1, 2, 3}, False), (2, 4, {2, 3}, False)],
    )
    def test_threads_have_a_core_each_only_where_there_is_one_for_each_thread_and_no_more(
        self,
        workers: int,
        cores: int,
        usable: set[int],
        pinned: bool,
        fake: list[FakePool],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(os, "cpu_count", lambda: cores)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: usable, raising=False)
        make("CartPole-v1", workers=workers)
        assert fake[0].pinned == pinned

    def test_a_reward_that_is_not_finite_is_named(self, fake: list[FakePool]) -> None:
        envs = make("Pendulum-v1")
        fake[0].nan_reward_at = 2
        envs.reset()
        envs.step(torch.zeros(3, 1))
        with pytest.raises(EnvError, match=r"environment 1, after 2 steps, gave a reward that is not finite"):
            envs.step(torch.zeros(3, 1))

    def test_an_action_that_is_not_finite_does_not_reach_it(self, fake: list[FakePool]) -> None:
        envs = make("Pendulum-v1")
        envs.reset()
        with pytest.raises(EnvError, match="the action for environment 2 is not finite"):
            envs.step(torch.tensor([[0.0], [0.0], [float("nan")]]))
        assert fake[0].steps == 0


class TestSettings:
    def test_a_missing_package_names_the_extra(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "envpool", None)
        with pytest.raises(EnvError, match=r"pip install 'trpo\[envpool\]'"):
            make("CartPole-v1")

    def test_an_unknown_id_names_near_matches(self, fake: list[FakePool]) -> None:
        with pytest.raises(EnvError, match=r"envpool has no 'Hoper-v5'; did you mean Hopper-v5 or Hopper-v4"):
            make("Hoper-v5")
        with pytest.raises(EnvError, match=r"envpool has no 'Zork'; set env.backend to gymnasium"):
            make("Zork")

    @pytest.mark.parametrize(
        ("env_id", "message"),
        [
            ("OnlyHere-v0", "no environment 'OnlyHere-v0' is registered"),
            ("Acrobot-v1", "observes 7 numbers in envpool and 6 in Gymnasium"),
            ("MountainCar-v0", r"acts in Discrete\(4\) in envpool and in Discrete\(3\) in Gymnasium"),
        ],
    )
    def test_a_task_that_is_not_gymnasiums_is_refused_and_closed(
        self, env_id: str, message: str, fake: list[FakePool]
    ) -> None:
        with pytest.raises(EnvError, match=message):
            make(env_id)
        assert [pool.closings for pool in fake] == [1]

    def test_wrappers_are_refused(self, fake: list[FakePool]) -> None:
        with pytest.raises(EnvError, match=r"env.wrappers: backend envpool takes none"):
            make("CartPole-v1", wrappers=(WrapperConfig(name="gymnasium.wrappers:TimeLimit"),))

    def test_keyword_arguments_go_to_both(self, fake: list[FakePool]) -> None:
        with pytest.raises(EnvError, match=r"by envpool with env.kwargs \{'g': 1\}: TypeError"):
            make("Pendulum-v1", kwargs={"g": 1})
        with pytest.raises(EnvError, match=r"built with env.kwargs \{'frame_skip': 2\}: TypeError"):
            make("Pendulum-v1", kwargs={"frame_skip": 2})


def run_config() -> Config:
    return config_for(
        env={"id": "CartPole-v1", "num_envs": 2, "backend": "envpool", "stagger": False},
        total_steps=4 * 64,
        batch_size=64,
        device="cpu",
        evaluation={"every_steps": 0, "final_episodes": 2},
    )


class TestResume:
    def test_begins_episodes_that_were_not_in_the_run(self, fake: list[FakePool]) -> None:
        envs = make("CartPole-v1")
        assert not envs.exact_resume
        first = envs.reset().clone()
        for action in random_actions(envs.single_action_space, 9, 3):
            envs.step(action)
        again, once_more = make("CartPole-v1"), make("CartPole-v1")
        begun = again.load_state_dict(envs.state_dict()).clone()
        assert not torch.isin(begun, first).any()
        assert torch.equal(once_more.load_state_dict(envs.state_dict()), begun)
        assert again.state_dict() == envs.state_dict()
        assert [pool.closings for pool in fake] == [0, 1, 1, 0, 0]  # those of the first seeds make way for others

    def test_a_run_goes_on_and_its_cut_episodes_count_nowhere(self, tmp_path: Path, fake: list[FakePool]) -> None:
        run = Trainer(run_config(), root=tmp_path, console=False).train(max_updates=1).directory
        trainer = Trainer(load_config(run / "config.yaml"), resume=run, console=False)
        assert trainer.env_steps > 0
        assert trainer.collector.state_dict()["running_length"].tolist() == [0, 0]
        assert trainer.collector.state_dict()["running_return"].tolist() == [0, 0]
        rollout, episodes = trainer.collector.collect()
        ended = (rollout.terminated | rollout.truncated).T
        assert episodes.lengths[0] == 1 + min(int(row.nonzero()[0]) for row in ended if row.any())
        result = trainer.train()
        assert result.evaluation is not None and result.env_steps < 4 * 64  # rows that are resets are no steps


@pytest.mark.envpool
@pytest.mark.filterwarnings("ignore")  # of both packages about their own spaces and models
class TestThePackage:
    @pytest.mark.parametrize("env_id", ["Hopper-v5", "Walker2d-v5", "HalfCheetah-v5", "Swimmer-v5"])
    def test_physics_are_gymnasiums(self, env_id: str) -> None:
        """From the state that a reset without noise begins in. Two versions of MuJoCo round differently, by 1e-15 a
        step, and twenty steps with contacts amplify that up to a millionfold; 1e-7 of observations of order 10 would
        still show any other model, order of substeps or clipping."""
        settings = {"reset_noise_scale": 0.0}
        envs, env = make(env_id, [1, 2], kwargs=settings), gymnasium.make(env_id, **settings)
        expected, _ = env.reset()
        np.testing.assert_allclose(envs.reset()[1], expected, rtol=0, atol=1e-12)
        for action in random_actions(env.action_space, 20, 1).expand(-1, 2, -1):
            step = envs.step(action)
            expected, reward, terminated, _, _ = env.step(native(env.action_space, action[1]))
            np.testing.assert_allclose(step.next_obs[1], expected, rtol=0, atol=1e-7)
            assert float(step.reward[1]) == pytest.approx(float(reward), rel=1e-6, abs=1e-6)  # a float32 there
            assert bool(step.terminated[1]) == terminated
            if terminated:
                break

    @pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1", "Acrobot-v1", "Ant-v5", "Humanoid-v5"])
    def test_numbers_depend_neither_on_threads_nor_on_the_split(self, env_id: str) -> None:
        whole, threads, part = make(env_id, workers=1), make(env_id, workers=3), make(env_id, SEEDS[1:2])
        first = whole.reset()
        assert torch.equal(first, threads.reset()) and torch.equal(first[1:2], part.reset())
        rows = 0
        for action in random_actions(whole.single_action_space, 300, 3):
            a, b, c = whole.step(action), threads.step(action), part.step(action[1:2])
            rows += int((~a.valid).sum())
            for name in ("next_obs", "reward", "terminated", "truncated", "valid"):
                assert torch.equal(getattr(a, name), getattr(b, name)), name
                assert torch.equal(getattr(a, name)[1:2], getattr(c, name)), name
        assert rows > 0 or env_id == "Acrobot-v1"

    def test_the_row_after_an_end_begins_the_next_episode(self) -> None:
        """So the stand-in does as the package."""
        envs = make("Pendulum-v1")
        envs.reset()
        ends = []
        for t in range(1, 403):
            step = envs.step(torch.zeros(3, 1))
            if bool(step.truncated.all()):
                ends.append(t)
            reset_row = t in (201, 402)
            assert bool(step.valid.all()) is not reset_row
            if reset_row:
                assert not step.reward.any() and (step.next_obs[:, 2].abs() <= 1).all()
        assert ends == [200, 401]
        assert isinstance(envs.single_action_space, Box)

    def test_seeds_begin_different_episodes(self) -> None:
        first = make("CartPole-v1").reset().clone()
        assert len(first.unique(dim=0)) == 3
        resumed = make("CartPole-v1").load_state_dict({"steps": 100})
        assert not torch.isin(resumed, first).any()

    def test_trains_and_is_evaluated_in_gymnasium(self, tmp_path: Path) -> None:
        result = Trainer(run_config(), root=tmp_path, console=False).train()
        assert result.evaluation is not None and len(result.evaluation.returns) == 2
