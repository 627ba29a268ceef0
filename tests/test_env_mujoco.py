"""MuJoCo's tasks stepped as a batch: the oracle is the backend `gymnasium`, which steps Gymnasium's own classes.

Every comparison is of bits, without tolerance: MuJoCo's batch promises those of a loop, and what is computed of the
states does the operations of Gymnasium's classes in their order.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import gymnasium
import numpy as np
import pytest
import torch
from commands import config_for
from gymnasium.envs.registration import WrapperSpec

from trpo.config import EnvConfig, WrapperConfig
from trpo.envs import make_envs, make_single_env
from trpo.envs.contract import BatchEnv
from trpo.envs.mujoco_batch import simulations_beside
from trpo.envs.mujoco_tasks import TASKS
from trpo.errors import EnvError
from trpo.evaluation import Evaluation, evaluate
from trpo.run.saved_policy import load_policy
from trpo.trainer import Trainer

pytest.importorskip("mujoco.batch", reason="MuJoCo before 4.0 has no batch")

PRETRAINED = Path(__file__).parents[1] / "pretrained"
SEEDS = [11, 7, 2**31 + 5]
IDS = [name for name, spec in gymnasium.registry.items() if spec.entry_point in TASKS]
FIELDS = ("next_obs", "reset_obs", "reward", "terminated", "truncated", "valid", "success")
BACKENDS = ("mujoco", "gymnasium")
OTHERWISE = [
    ("Ant-v5", {"include_cfrc_ext_in_observation": False, "main_body": "front_left_leg"}),
    ("Ant-v5", {"healthy_z_range": (0.5, 0.8), "contact_force_range": (-0.1, 0.2), "contact_cost_weight": 0.1}),
    ("Ant-v5", {"terminate_when_unhealthy": False, "exclude_current_positions_from_observation": False}),
    ("HalfCheetah-v5", {"forward_reward_weight": 2, "exclude_current_positions_from_observation": False}),
    ("HalfCheetah-v5", {"max_episode_steps": 30, "reset_noise_scale": 0.3}),
    ("Hopper-v5", {"terminate_when_unhealthy": False, "healthy_reward": 3}),
    ("Hopper-v5", {"healthy_state_range": (-2.0, 2.0)}),
    ("Hopper-v5", {"healthy_state_range": ([-1.0] * 10, [0.5] * 10)}),
    ("Hopper-v5", {"terminate_when_unhealthy": 2}),
    ("Walker2d-v5", {"healthy_angle_range": (-0.1, 0.3), "ctrl_cost_weight": 0.7}),
    ("Humanoid-v5", {"include_cinert_in_observation": False, "include_cfrc_ext_in_observation": False}),
    ("Humanoid-v5", {"contact_cost_weight": 1e-3, "contact_cost_range": (1.0, 5.0)}),
    ("HumanoidStandup-v5", {"include_cvel_in_observation": False, "include_qfrc_actuator_in_observation": False}),
    ("InvertedDoublePendulum-v5", {"healthy_reward": 2.5}),
    ("Pusher-v5", {"reward_near_weight": 0.3, "reward_control_weight": 0.7}),
    ("Reacher-v5", {"reward_dist_weight": 3, "reward_control_weight": 0.1}),
    ("Swimmer-v5", {"exclude_current_positions_from_observation": False}),
]


def make(env_id: str, backend: str = "mujoco", *, seeds: list[int] = SEEDS, workers: int = 1, **settings: Any) -> Any:
    return make_envs(EnvConfig(id=env_id, backend=backend, workers=workers, **settings), seeds)


def together(envs: Any) -> bool:
    """Whether they are stepped together."""
    return getattr(envs._shard, "_simulations", None) is not None


def actions(envs: BatchEnv, steps: int, seed: int = 0) -> torch.Tensor:
    """[T, N, A], beyond the bounds too."""
    space: Any = envs.single_action_space
    rows = np.random.default_rng(seed).uniform(1.5 * space.low, 1.5 * space.high, (steps, envs.num_envs, *space.shape))
    return torch.from_numpy(rows.astype(np.float32))


def assert_same_steps(ours: BatchEnv, theirs: BatchEnv, steps: int, seed: int = 0) -> int:
    """Both go on alike; returns how many episodes ended."""
    ends = 0
    for t, action in enumerate(actions(theirs, steps, seed)):
        step, expected = ours.step(action), theirs.step(action)
        for name in FIELDS:
            given, right = getattr(step, name).numpy(), getattr(expected, name).numpy()
            assert given.tobytes() == right.tobytes(), f"{name}, step {t}"
        ends += int((expected.terminated | expected.truncated).sum())
    return ends


class TestTheSameBits:
    @pytest.mark.parametrize("workers", [1, 3])
    @pytest.mark.parametrize("env_id", IDS)
    def test_every_task(self, env_id: str, workers: int) -> None:
        ours, theirs = make(env_id, workers=workers), make(env_id, "gymnasium")
        assert ours.single_observation_space == theirs.single_observation_space
        assert torch.equal(ours.reset(), theirs.reset())
        longest = gymnasium.spec(env_id).max_episode_steps or 0
        # Staggered first episodes, then later ones, which no seed begins.
        assert assert_same_steps(ours, theirs, min(longest, 400) + 20) > 0

    @pytest.mark.parametrize(("env_id", "kwargs"), OTHERWISE)
    def test_with_other_settings(self, env_id: str, kwargs: dict[str, Any]) -> None:
        ours, theirs = make(env_id, kwargs=kwargs), make(env_id, "gymnasium", kwargs=kwargs)
        assert torch.equal(ours.reset(), theirs.reset())
        assert_same_steps(ours, theirs, 150)

    def test_whole_episodes_of_a_thousand_steps(self) -> None:
        ours, theirs = make("HalfCheetah-v5", stagger=False), make("HalfCheetah-v5", "gymnasium", stagger=False)
        assert torch.equal(ours.reset(), theirs.reset())
        assert assert_same_steps(ours, theirs, 1010) == len(SEEDS)

    def test_many_rewards_by_powers(self) -> None:
        """Of a thousand numbers one has another square as a power of a number than as one of an array."""
        seeds = list(range(32))
        ours, theirs = (make("InvertedDoublePendulum-v5", backend, seeds=seeds) for backend in ("mujoco", "gymnasium"))
        assert torch.equal(ours.reset(), theirs.reset())
        assert_same_steps(ours, theirs, 500, seed=1)

    @pytest.mark.parametrize(("env_id", "workers"), [("Hopper-v5", 1), ("Ant-v5", 3)])
    def test_a_simulation_that_diverges(self, env_id: str, workers: int) -> None:
        """MuJoCo resets it in the middle of a step."""
        ours, theirs = make(env_id, workers=workers), make(env_id, "gymnasium")
        assert torch.equal(ours.reset(), theirs.reset())
        theirs._shard._envs[1].unwrapped.data.qvel[:] = 1e30
        ours._shard._simulations._data.qvel[1] = 1e30
        assert_same_steps(ours, theirs, 30)

    def test_a_run_is_the_same_with_either(self, tmp_path: Path) -> None:
        theta = []
        for backend in ("gymnasium", "auto"):
            env = {"id": "Hopper-v5", "num_envs": 4, "backend": backend, "workers": 2}
            config = config_for(env=env, total_steps=512, batch_size=128, name=backend)
            trainer = Trainer(config, root=tmp_path)
            trainer.train()
            theta.append(trainer.agent.policy.theta.vector)
        assert torch.equal(*theta)


class TestExactResume:
    @pytest.mark.parametrize("env_id", ["Hopper-v5", "Ant-v5", "Reacher-v5"])
    @pytest.mark.parametrize(
        ("before", "after"), [("mujoco", "mujoco"), ("mujoco", "gymnasium"), ("gymnasium", "mujoco")]
    )
    def test_goes_on_to_the_bit_in_any_backend(self, env_id: str, before: str, after: str) -> None:
        undisturbed = make(env_id, before)
        undisturbed.reset()
        for action in actions(undisturbed, 130):
            undisturbed.step(action)
        restored = make(env_id, after, seeds=[1, 2, 3])
        assert torch.equal(restored.load_state_dict(undisturbed.state_dict()), undisturbed._step.reset_obs)
        assert restored.exact_resume
        assert_same_steps(restored, undisturbed, 100, seed=1)

    def test_states_are_those_of_gymnasium_however_long_an_episode_and_whenever_asked_for(self) -> None:
        """Actions are kept for all at once for a while, and reach the episodes' logs now and then."""
        ours, theirs = (make("HalfCheetah-v5", backend, kwargs={"max_episode_steps": 700}) for backend in BACKENDS)
        ours.reset(), theirs.reset()
        ends = 0
        for seed, steps in enumerate((3, 0, 253, 1, 300, 600)):
            ends += assert_same_steps(ours, theirs, steps, seed)
            for mine, other in zip(ours.state_dict()["envs"], theirs.state_dict()["envs"], strict=True):
                assert mine["seed"] == other["seed"] and mine["rng"] == other["rng"]
                assert mine["actions"].tobytes() == other["actions"].tobytes()
        assert ends >= 3

    def test_what_cannot_be_replayed_begins_new_episodes(self) -> None:
        envs = make("Hopper-v5")
        envs.reset()
        for action in actions(envs, 5):
            envs.step(action)
        state = envs.state_dict()
        state["envs"][0]["obs"] += 1
        first, second = make("Hopper-v5"), make("Hopper-v5", "gymnasium")
        assert torch.equal(first.load_state_dict(state), second.load_state_dict(state))
        assert not first.exact_resume
        assert_same_steps(first, second, 50)


class TestEvaluation:
    @pytest.mark.parametrize("deterministic", [True, False])
    @pytest.mark.parametrize(("name", "limit"), [("Walker2d-v5", None), ("Ant-v5", 60), ("Reacher-v5", None)])
    def test_scores_are_gymnasiums(self, name: str, limit: int | None, deterministic: bool) -> None:
        saved = load_policy(PRETRAINED / name)
        saved.policy.theta.vector.mul_(0.7)  # some walkers fall now, each at a time of its own
        kwargs = {"max_episode_steps": limit} if limit else {}

        def scores(backend: str) -> Evaluation:
            env = EnvConfig(id=name, backend=backend, kwargs=kwargs, num_envs=3)
            return evaluate(saved.policy, env, saved.action_space, episodes=4, seed=5, deterministic=deterministic)

        assert scores("auto") == scores("gymnasium")

    def test_is_of_gymnasium_where_that_is_asked_for(self) -> None:
        env = make_single_env(EnvConfig(id="Hopper-v5"))
        for backend, there in {"gymnasium": False, "gymnasium-async": False, "auto": True, "envpool": True}.items():
            found = simulations_beside(EnvConfig(id="Hopper-v5", backend=backend), env, 2)
            assert (found is not None) is there

    @pytest.mark.parametrize("look", ["video", "render"])
    def test_what_is_looked_at_is_stepped_by_gymnasium(
        self, look: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Else its own data, which is what is drawn, would stand still."""
        steps = 0
        kind = importlib.import_module("gymnasium.envs.mujoco.reacher_v5").ReacherEnv
        step = kind.step

        def counted(self: Any, action: Any) -> Any:
            nonlocal steps
            steps += 1
            return step(self, action)

        monkeypatch.setattr(kind, "step", counted)
        for name in ("returns.check_recordable", "returns.check_showable", "episodes.VideoWriter"):
            monkeypatch.setattr(f"trpo.evaluation.{name}", MagicMock())
        monkeypatch.setattr(kind, "render", lambda self: None)
        saved = load_policy(PRETRAINED / "Reacher-v5")
        looked_at: dict[str, Any] = {"video": tmp_path / "reacher.mp4"} if look == "video" else {"render": True}
        env = EnvConfig(id="Reacher-v5")
        evaluate(saved.policy, env, saved.action_space, episodes=2, seed=0, **looked_at)
        assert steps == 2 * 50

    def test_what_mujoco_raises_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        batch = importlib.import_module("mujoco.batch")

        def fail(*_: Any, **__: Any) -> None:
            raise batch.SimulationError(np.array([1]), "out of memory", 3)

        saved = load_policy(PRETRAINED / "Reacher-v5")
        monkeypatch.setattr("trpo.envs.mujoco_batch._try_out", lambda *_: None)
        monkeypatch.setattr(batch.Batch, "step", fail)
        with pytest.raises(EnvError, match=r"0 steps into its episodes, raised SimulationError: .*out of memory"):
            evaluate(saved.policy, EnvConfig(id="Reacher-v5"), saved.action_space, episodes=2, seed=0)


class TestWhereItApplies:
    @pytest.mark.filterwarnings("ignore:.*latest versioned environment")
    @pytest.mark.parametrize("env_id", IDS)
    def test_auto_takes_it(self, env_id: str) -> None:
        assert together(make(env_id, "auto"))
        assert together(make(env_id.removesuffix("-v5"), "auto"))  # the newest version

    @pytest.mark.parametrize(
        "settings",
        [
            {"id": "Hopper-v4"},
            {"id": "Pendulum-v1"},
            {"id": "Hopper-v5", "wrappers": (WrapperConfig(name="gymnasium.wrappers:ClipAction"),)},
            {"id": "Hopper-v5", "kwargs": {"render_mode": "rgb_array"}},
        ],
        ids=str,
    )
    @pytest.mark.filterwarnings("ignore:.*out of date")
    def test_auto_takes_gymnasium_for_the_rest(self, settings: dict[str, Any]) -> None:
        warnings: list[str] = []
        envs: Any = make_envs(EnvConfig(**settings), SEEDS, on_warning=warnings.append)
        assert not together(envs) and not warnings
        envs.reset()
        envs.step(torch.zeros(len(SEEDS), *envs.single_action_space.shape))

    @pytest.mark.parametrize(("env_id", "trees"), [("Hopper-v5", 1), ("Pusher-v5", 3)])
    def test_islands_are_looked_for_where_there_can_be_several(self, env_id: str, trees: int) -> None:
        """The rest of an environment's model is as it was, and so is the environment's own."""
        mujoco = importlib.import_module("mujoco")
        shard = make(env_id)._shard
        own, batched = shard._envs[0].unwrapped.model, shard._simulations._model
        assert own.ntree == batched.ntree == trees
        assert own.opt.disableflags == 0
        assert batched.opt.disableflags == (mujoco.mjtDisableBit.mjDSBL_ISLAND if trees == 1 else 0)
        batched.opt.disableflags = 0
        sizes = [mujoco.mj_sizeModel(model) for model in (own, batched)]
        buffers = [np.zeros(size, np.uint8) for size in sizes]
        for model, buffer in zip((own, batched), buffers, strict=True):
            mujoco.mj_saveModel(model, None, buffer)
        assert np.array_equal(*buffers)

    def test_a_task_registered_under_another_name_is_the_same_task(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gymnasium.envs.registration, "registry", dict(gymnasium.registry))
        entry_point = gymnasium.spec("Hopper-v5").entry_point
        gymnasium.register("Hop-v0", entry_point, kwargs={"healthy_reward": 2.0}, max_episode_steps=20)
        ours, theirs = make("Hop-v0"), make("Hop-v0", "gymnasium")
        assert torch.equal(ours.reset(), theirs.reset())
        assert assert_same_steps(ours, theirs, 100) > 0

    def test_a_subclass_is_another_task(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gymnasium.envs.registration, "registry", dict(gymnasium.registry))
        hopper: Any = importlib.import_module("gymnasium.envs.mujoco.hopper_v5").HopperEnv
        gymnasium.register("Hop-v0", type("Hop", (hopper,), {}))
        assert not together(make("Hop-v0", "auto"))
        with pytest.raises(EnvError, match="backend mujoco has no 'Hop-v0'"):
            make("Hop-v0")

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            (
                {"id": "Pendulum-v1"},
                r"backend mujoco has no 'Pendulum-v1', only .*Hopper-v5.*; otherwise set env\.backend",
            ),
            (
                {"id": "Hopper-v5", "wrappers": (WrapperConfig(name="gymnasium.wrappers:ClipAction"),)},
                "Hopper-v5 is wrapped in ClipAction: backend mujoco takes no wrapper; set env.backend to gymnasium",
            ),
            ({"id": "Hopper-v5", "kwargs": {"render_mode": "rgb_array"}}, "Hopper-v5 has render_mode 'rgb_array', and"),
        ],
        ids=str,
    )
    def test_what_it_cannot_do_is_named(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(EnvError, match=message):
            make_envs(EnvConfig(backend="mujoco", **settings), SEEDS)

    def test_mujoco_without_a_batch_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "mujoco.batch", None)
        with pytest.raises(
            EnvError, match=r"needs mujoco\.batch, of MuJoCo 4\.0; this is .*: pip install -U mujoco, or set"
        ):
            make("Hopper-v5")

    @pytest.mark.parametrize("change", ["reward", "observation", "end", "weight"])
    def test_a_gymnasium_that_computes_something_else_is_noticed(
        self, change: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Its next version may; then the numbers are Gymnasium's, not those remembered here."""
        kind = importlib.import_module("gymnasium.envs.mujoco.hopper_v5").HopperEnv
        step, observe, init = kind.step, kind._get_obs, kind.__init__

        def rewarded_otherwise(self: Any, action: Any) -> Any:
            obs, reward, *rest = step(self, action)
            return obs, reward * (1 + 1e-15), *rest

        def ending_otherwise(self: Any, action: Any) -> Any:
            obs, reward, _, *rest = step(self, action)
            return obs, reward, True, *rest

        def without_a_weight(self: Any, **kwargs: Any) -> None:
            init(self, **kwargs)
            del self._forward_reward_weight

        if change == "observation":
            monkeypatch.setattr(kind, "_get_obs", lambda self: observe(self) * (1 + 1e-15))
        elif change == "weight":
            monkeypatch.setattr(kind, "__init__", without_a_weight)
            monkeypatch.setattr(kind, "_get_rew", lambda self, velocity, action: (velocity, {}))
        else:
            monkeypatch.setattr(kind, "step", rewarded_otherwise if change == "reward" else ending_otherwise)
        with pytest.raises(EnvError, match=r"^Hopper-v5 of Gymnasium .*; set env\.backend to gymnasium$"):
            make("Hopper-v5")
        warnings: list[str] = []
        envs = make_envs(EnvConfig(id="Hopper-v5"), SEEDS, on_warning=warnings.append)
        assert not together(envs)
        assert len(warnings) == 1 and warnings[0].endswith("set env.backend to gymnasium, which is used now")

    def test_what_mujoco_raises_is_named_with_its_environment(self) -> None:
        envs = make("Hopper-v5", stagger=False)
        envs.reset()
        batch = importlib.import_module("mujoco.batch")

        class Failing:
            def step(self, *_: Any, **__: Any) -> None:
                raise batch.SimulationError(np.array([1]), "out of memory", 3)

        envs._shard._simulations._batch = Failing()
        with pytest.raises(
            EnvError, match=r"^environment 1, step 1 of its episode, raised SimulationError: .*out of memory"
        ):
            envs.step(torch.zeros(3, 3))

    def test_two_time_limits(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gymnasium.envs.registration, "registry", dict(gymnasium.registry))
        limit = WrapperSpec("TimeLimit", "gymnasium.wrappers:TimeLimit", {"max_episode_steps": 7})
        entry_point = gymnasium.spec("Reacher-v5").entry_point
        gymnasium.register("Reach-v0", entry_point, max_episode_steps=9, additional_wrappers=(limit,))
        ours, theirs = make("Reach-v0", stagger=False), make("Reach-v0", "gymnasium", stagger=False)
        assert torch.equal(ours.reset(), theirs.reset())
        assert assert_same_steps(ours, theirs, 20) == 2 * len(SEEDS)

    @pytest.mark.parametrize("registered", ["wrapped", "drawn"])
    def test_auto_looks_at_the_environment_and_not_at_its_name(
        self, registered: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(gymnasium.envs.registration, "registry", dict(gymnasium.registry))
        entry_point = gymnasium.spec("Reacher-v5").entry_point
        clip = WrapperSpec("ClipReward", "gymnasium.wrappers:ClipReward", {"max_reward": 0.0})
        more: dict[str, Any] = {"additional_wrappers": (clip,)} if registered == "wrapped" else {}
        gymnasium.register("Reach-v0", entry_point, kwargs={} if more else {"render_mode": "rgb_array"}, **more)
        assert not together(make("Reach-v0", "auto"))
        saved = load_policy(PRETRAINED / "Reacher-v5")
        env = EnvConfig(id="Reach-v0")
        evaluate(saved.policy, env, saved.action_space, episodes=2, seed=0, max_episode_steps=3)

    def test_a_fork_says_that_the_threads_are_not_its_own(self) -> None:
        """And ends: freeing the batch there would wait for its threads for ever."""
        program = """
            import os, sys, torch
            from trpo.config import EnvConfig
            from trpo.envs import make_envs
            envs = make_envs(EnvConfig(id="Reacher-v5", backend="mujoco", workers=2), [0, 1])
            envs.reset()
            if os.fork() == 0:
                try:
                    envs.step(torch.zeros(2, 2))
                except Exception as error:
                    print(error)
                del envs
            else:
                os.wait()
                envs.step(torch.zeros(2, 2))
                print("stepped")
            """
        command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(program)]
        told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.splitlines()
        assert told[0].startswith("the threads of these environments are those of another process: make them here")
        assert told[-1] == "stepped"

    @pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")
    def test_closed_it_has_no_threads(self) -> None:
        envs = make("Reacher-v5", workers=3)
        envs.reset()
        before = len(os.listdir("/proc/self/task"))
        envs.close()
        assert len(os.listdir("/proc/self/task")) == before - 2

    def test_threads_are_those_of_the_settings(self) -> None:
        shard = make("Hopper-v5", workers=2)._shard
        assert shard._simulations._batch.nthread == 2
