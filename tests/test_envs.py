"""Environments in this process, and what both backends share: the oracle is raw Gymnasium, stepped by hand."""

from __future__ import annotations

import itertools
import json
import re
import sys
from pathlib import Path
from typing import Any

import faulty_envs
import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, Graph, MultiBinary, MultiDiscrete, Sequence, Text, Tuple
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from hypothesis import given
from hypothesis import strategies as st

from trpo.config import EnvConfig, WrapperConfig
from trpo.envs import make_envs, make_single_env
from trpo.envs.replay import needs_fresh_environment
from trpo.envs.returned import ReturnError, success_of
from trpo.envs.shard import EnvShard
from trpo.envs.spaces import ActionEncoding
from trpo.envs.vector import VectorEnvAdapter
from trpo.errors import EnvError

# Box2D's bindings warn while they are imported, and crash where the warning is made an error.
pytestmark = pytest.mark.filterwarnings("ignore:builtin type [sS]wig:DeprecationWarning")

BACKENDS = [("gymnasium", 0), ("gymnasium-async", 1), ("gymnasium-async", 2), ("gymnasium-async", 3)]
SEEDS = [11, 7, 2**31 + 5]


def config(env_id: str, backend: str = "gymnasium", workers: int = 0, **settings: Any) -> EnvConfig:
    return EnvConfig(id=env_id, backend=backend, workers=workers, **{"stagger": False} | settings)


def tiny(name: str, **kwargs: Any) -> EnvConfig:
    return config(f"faulty_envs:{name}-v0", kwargs=kwargs)


def random_actions(space: Any, steps: int, num_envs: int, seed: int = 0) -> torch.Tensor:
    """Actions [T, N, A] as a policy would encode them; for a Box beyond its bounds too."""
    rng = np.random.default_rng(seed)
    if isinstance(space, Discrete):
        return torch.from_numpy(rng.integers(0, space.n, (steps, num_envs, 1)))
    return torch.from_numpy(rng.uniform(-2, 2, (steps, num_envs, *space.shape)).astype(np.float32))


def raw_rollout(env_id: str, seed: int, actions: Any) -> list[tuple[Any, ...]]:
    """(next_obs, reset_obs, reward, terminated, truncated) of each step, by Gymnasium alone."""
    env = gymnasium.make(env_id)
    env.reset(seed=seed)
    rows = []
    for action in actions:
        given = int(action[0]) if isinstance(env.action_space, Discrete) else np.clip(action, -1, 1)
        obs, reward, terminated, truncated, _ = env.step(given)
        rows.append((obs, env.reset()[0] if terminated or truncated else obs, reward, terminated, truncated))
    env.close()
    return rows


class TestAgainstRawGymnasium:
    @pytest.mark.parametrize(
        ("env_id", "backend", "workers"), [("Hopper-v5", *BACKENDS[0]), *(("CartPole-v1", *run) for run in BACKENDS)]
    )
    def test_same_seeds_and_actions_give_the_same_bits(self, env_id: str, backend: str, workers: int) -> None:
        envs = make_envs(config(env_id, backend, workers), SEEDS)
        actions = random_actions(envs.single_action_space, 150, 3)
        oracle = [raw_rollout(env_id, seed, actions[:, i].numpy()) for i, seed in enumerate(SEEDS)]
        envs.reset()
        for t, action in enumerate(actions):
            step = envs.step(action)
            assert step.valid.all()
            for i in range(3):
                expected = [np.asarray(x) for x in oracle[i][t]]
                found = [x[i].numpy() for x in (step.next_obs, step.reset_obs, step.reward)]
                for a, b in zip(found, expected, strict=False):
                    assert a.dtype == b.dtype and a.tobytes() == b.tobytes()
                assert (step.terminated[i].item(), step.truncated[i].item()) == (expected[3], expected[4])
        assert sum(row[3] for rows in oracle for row in rows) > 3  # resets were crossed
        envs.close()

    def test_later_resets_do_not_repeat_the_seed(self) -> None:
        envs = make_envs(config("Pendulum-v1"), [3])
        first, second = envs.reset().clone(), envs.reset().clone()
        env = gymnasium.make("Pendulum-v1")
        assert np.array_equal(first[0], env.reset(seed=3)[0])
        assert np.array_equal(second[0], env.reset()[0])

    def test_seeds_belong_to_environments_whatever_the_split(self) -> None:
        whole = make_envs(config("Acrobot-v1"), SEEDS).reset()
        parts = [make_envs(config("Acrobot-v1"), [seed]).reset() for seed in SEEDS]
        assert torch.equal(whole, torch.cat(parts))


class TestEpisodeEnds:
    @pytest.mark.parametrize("ending", ["terminated", "truncated"])
    def test_successor_is_the_final_observation_and_reset_obs_the_next_first(self, ending: str) -> None:
        envs = make_envs(tiny("Counting", length=3, ending=ending), [0, 1])
        envs.reset()
        seen = []
        for _ in range(7):
            step = envs.step(torch.zeros(2, 1, dtype=torch.int64))
            flags = {"terminated": step.terminated, "truncated": step.truncated}
            assert not flags[({"terminated", "truncated"} - {ending}).pop()].any()
            seen.append((*step.next_obs[1, :2].tolist(), *step.reset_obs[1, :2].tolist(), bool(flags[ending][1])))
        # [episode, step] of successor and of what to act on next, and whether the episode ended
        assert seen == [
            (0, 1, 0, 1, False),
            (0, 2, 0, 2, False),
            (0, 3, 1, 0, True),
            (1, 1, 1, 1, False),
            (1, 2, 1, 2, False),
            (1, 3, 2, 0, True),
            (2, 1, 2, 1, False),
        ]

    def test_success_is_reported_at_the_end_only(self) -> None:
        envs = make_envs(tiny("Counting", length=2), [0])
        envs.reset()
        success = [envs.step(torch.zeros(1, 1, dtype=torch.int64)).success.item() for _ in range(4)]
        assert np.array_equal(success, [np.nan, 1.0, np.nan, 0.0], equal_nan=True)

    def test_tensors_are_views_and_no_copies(self) -> None:
        envs = make_envs(tiny("Counting"), [0])
        obs = envs.reset()
        step = envs.step(torch.zeros(1, 1, dtype=torch.int64))
        assert step.reset_obs.data_ptr() == obs.data_ptr()


class TestActions:
    @pytest.mark.parametrize(
        ("space", "given", "received"),
        [
            (Box(-1, 0.5, (2, 2)), [[-3.0, 0.25, 2.0, -0.5]], [-1.0, 0.25, 0.5, -0.5]),
            (Box(-np.inf, np.array([np.inf, 1.0]), (2,), np.float64), [[-(2.0**99), 9.0]], [-(2.0**99), 1.0]),
            (Box(0, 255, (2,), np.uint8), [[254.7, -3.0]], [255, 0]),
            (Discrete(3, start=-1), [[0]], [-1]),
            (Discrete(3, start=5), [[2]], [7]),
            (MultiDiscrete([3, 4], start=[10, 20]), [[2, 3]], [12, 23]),
            (MultiDiscrete([[2, 3], [4, 5]]), [[1, 2, 3, 4]], [1, 2, 3, 4]),
            (MultiBinary([2, 2]), [[1, 0, 0, 1]], [1, 0, 0, 1]),
        ],
    )
    def test_what_the_environment_receives(self, space: Any, given: Any, received: Any) -> None:
        envs = make_envs(tiny("Echo", action_space=space), [0])
        envs.reset()
        for _ in range(2):  # twice: an environment that overwrites its argument changes nothing of ours
            assert envs.step(torch.tensor(given)).next_obs[0].tolist() == received
        envs.load_state_dict(envs.state_dict())

    @given(st.lists(st.floats(-1e6, 1e6), min_size=3, max_size=3))
    def test_box_rows_are_clipped_elementwise(self, row: list[float]) -> None:
        encoding = ActionEncoding.of(
            Box(np.array([-1.0, -np.inf, 0.0]), np.array([1.0, 2.0, np.inf]), dtype=np.float64)
        )
        a, b, c = row
        assert encoding.native(np.array([row])).tolist() == [[min(max(a, -1.0), 1.0), min(b, 2.0), max(c, 0.0)]]

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_an_action_that_is_not_finite_is_named(self, bad: float) -> None:
        envs = make_envs(config("Pendulum-v1"), SEEDS)
        envs.reset()
        with pytest.raises(EnvError, match="environment 1 is not finite"):
            envs.step(torch.tensor([[0.0], [bad], [0.0]]))

    @pytest.mark.parametrize("shape", [(3,), (2, 1), (3, 2)])
    def test_wrong_shapes_are_refused(self, shape: tuple[int, ...]) -> None:
        envs = make_envs(config("Pendulum-v1"), SEEDS)
        envs.reset()
        with pytest.raises(EnvError, match="action has shape"):
            envs.step(torch.zeros(shape))

    @pytest.mark.parametrize("space", [Dict(a=Discrete(2)), Tuple([Discrete(2)]), Text(3), Sequence(Discrete(2))])
    def test_unsupported_spaces_are_refused(self, space: Any) -> None:
        with pytest.raises(EnvError, match=f"acts in a {type(space).__name__} space; supported are"):
            ActionEncoding.of(space)

    @pytest.mark.parametrize("space", [Box(0, 1, (0,)), Box(0, 1, (2, 0))])
    def test_spaces_without_a_component_are_refused(self, space: Any) -> None:
        with pytest.raises(EnvError, match="which has no component: there is nothing to learn"):
            ActionEncoding.of(space)


class TestObservations:
    @pytest.mark.parametrize(
        "space",
        [
            Box(0, 255, (2, 3), np.uint8),
            Box(-1, 1, (), np.float64),
            Discrete(4, start=2),
            MultiDiscrete([2, 3]),
            MultiBinary(3),
            Dict(b=Box(-1, 1, (2,)), a=Tuple([Discrete(3), MultiBinary(2)])),
        ],
    )
    def test_flattened_as_gymnasium_flattens(self, space: Any) -> None:
        envs = make_envs(tiny("Observing", observation_space=space), [5])
        obs = envs.reset()
        space.seed(5)
        expected = gymnasium.spaces.flatten(space, space.sample())
        assert obs[0].tolist() == expected.tolist()
        assert envs.single_observation_space.shape == expected.shape
        assert obs.numpy().dtype == envs.single_observation_space.dtype
        assert obs.dtype == (torch.float64 if expected.dtype == np.float64 else torch.float32)

    @pytest.mark.parametrize(
        "space", [Text(3), Sequence(Discrete(2)), Graph(Discrete(2), None), Dict(a=Dict(b=Text(2))), Tuple([Text(2)])]
    )
    def test_spaces_without_a_vector_are_refused_at_once(self, space: Any) -> None:
        with pytest.raises(EnvError, match="has no fixed-size vector"):
            make_envs(tiny("Observing", observation_space=space), [0])

    @pytest.mark.parametrize("space", [Box(0, 1, (0,)), Dict()])
    def test_spaces_without_a_component_are_refused(self, space: Any) -> None:
        with pytest.raises(EnvError, match="has no component: give the policy something to observe"):
            make_envs(tiny("Observing", observation_space=space), [0])


class TestMaking:
    def test_unknown_id_names_near_matches(self) -> None:
        with pytest.raises(EnvError, match=r"'Penduluum-v1' is registered; did you mean .*Pendulum-v1"):
            make_envs(config("Penduluum-v1"), [0])
        with pytest.raises(EnvError, match="did you mean CartPole-v1"):  # not v0
            make_single_env(EnvConfig(id="CartPoole-v0"))
        with pytest.raises(EnvError, match="'Foo-v1' is registered; if a package registers it"):
            make_single_env(EnvConfig(id="Foo-v1"))

    def test_unknown_version_names_the_known_ones(self) -> None:
        with pytest.raises(EnvError, match=r"did you mean .*CartPole-v1"):
            make_single_env(config("CartPole-v9"))

    def test_missing_module_is_named(self) -> None:
        with pytest.raises(EnvError, match="the module 'no_such_module' of"):
            make_single_env(config("no_such_module:Env-v0"))

    @pytest.mark.parametrize(
        ("env_id", "package", "extra"), [("Hopper-v5", "mujoco", "mujoco"), ("LunarLander-v3", "Box2D", "box2d")]
    )
    def test_missing_package_names_the_extra(
        self, env_id: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in [name for name in sys.modules if name.startswith(f"gymnasium.envs.{extra}")]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(EnvError, match=rf"pip install 'trpo\[{extra}\]'"):
            make_single_env(config(env_id))

    def test_a_warning_of_mujoco_is_printed_once(self, tmp_path: Any, monkeypatch: Any, capfd: Any) -> None:
        mujoco = pytest.importorskip("mujoco")
        monkeypatch.chdir(tmp_path)  # where MuJoCo itself would write MUJOCO_LOG.TXT
        before = mujoco.get_mju_user_warning()
        try:
            mujoco.set_mju_user_warning(None)
            for _ in range(3):
                make_single_env(config("HalfCheetah-v5")).close()
            ours = mujoco.get_mju_user_warning()
            for text in ("unstable at 0.1", "slow", "unstable at 0.25"):
                ours(text)
            said = capfd.readouterr().err.splitlines()
            assert len(said) == len(set(said)) and said[-2:] == ["MuJoCo: unstable at 0.1", "MuJoCo: slow"]
            assert not any(tmp_path.iterdir())
            mujoco.set_mju_user_warning(print)  # somebody else's is left alone
            make_single_env(config("HalfCheetah-v5")).close()
            assert mujoco.get_mju_user_warning() is print
        finally:
            mujoco.set_mju_user_warning(before)

    def test_mujoco_times_nothing_unless_somebody_gave_it_a_clock(self) -> None:
        mujoco = pytest.importorskip("mujoco")
        timed = mujoco.mjtTimer.mjTIMER_STEP

        def one_step() -> tuple[int, float]:
            env = make_single_env(config("InvertedPendulum-v5"))
            env.reset(seed=0)
            env.step(np.zeros(1, np.float32))
            timer = env.unwrapped.data.timer[timed]
            return timer.number, timer.duration

        number, duration = one_step()
        assert number > 0 and duration == 0.0
        ticks = itertools.count()
        mujoco.set_mjcb_time(lambda: float(next(ticks)))
        try:
            assert one_step()[1] > 0.0
        finally:
            mujoco.set_mjcb_time(None)  # the clock that MuJoCo's package comes with
        assert one_step() == (number, 0.0)

    def test_bad_kwargs_are_named(self) -> None:
        with pytest.raises(EnvError, match=r"env.kwargs \{'gravitas': 1\}: TypeError"):
            make_single_env(config("Pendulum-v1", kwargs={"gravitas": 1}))

    def test_kwargs_and_wrappers_apply_innermost_first(self) -> None:
        wrappers = (
            WrapperConfig(name="faulty_envs:AddTen", kwargs={"times": 2}),
            WrapperConfig(name="gymnasium.wrappers:TimeLimit", kwargs={"max_episode_steps": 2}),
        )
        env = make_single_env(config("faulty_envs:Counting-v0", kwargs={"length": 9}, wrappers=wrappers))
        assert env.reset()[0][:2].tolist() == [20.0, 20.0]
        assert [env.step(0)[3] for _ in range(2)] == [False, True]
        assert env.unwrapped.length == 9
        assert isinstance(env, gymnasium.wrappers.TimeLimit)

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("faulty_envs:SubtractTen", "cannot be imported"),
            ("no_such_module:Wrapper", "cannot be imported"),
            ("gymnasium.wrappers:TimeLimit", "cannot be built with kwargs"),
            ("builtins:id", "not a gymnasium.Env"),
        ],
    )
    def test_bad_wrappers_name_their_key(self, name: str, message: str) -> None:
        with pytest.raises(EnvError, match=rf"env.wrappers\[0\].*{message}"):
            make_single_env(config("Pendulum-v1", wrappers=(WrapperConfig(name=name),)))

    @pytest.mark.parametrize("what", ["observation_space", "action_space"])
    def test_an_environment_without_a_space_is_told_to_have_one(self, what: str) -> None:
        with pytest.raises(EnvError, match=f"Spaceless-v0 has no {what}: set self.{what}"):
            make_single_env(tiny("Spaceless", missing=what))

    def test_a_constructor_that_gives_up_is_an_error(self) -> None:
        with pytest.raises(EnvError, match=r"cannot be built with env.kwargs .*: SystemExit: no licence \("):
            make_single_env(tiny("Spaceless", missing="licence"))

    def test_render_mode_is_passed_on(self) -> None:
        assert make_single_env(config("Pendulum-v1"), render_mode="rgb_array").render_mode == "rgb_array"

    def test_environments_whose_spaces_differ_are_refused(self, tmp_path: Any) -> None:
        with pytest.raises(EnvError, match="environments 0 and 1 have different action spaces"):
            make_envs(tiny("FirstDiffers", marker=str(tmp_path / "built"), fails=False), [0, 1])


class TestFaults:
    @pytest.mark.parametrize(
        ("fault", "message"),
        [
            ("nan_reward", r"gave a reward that is not finite \(nan\)"),
            ("inf_obs", "gave an observation that is not finite"),
            ("huge_reward", r"gave a reward that is beyond 1e\+100 \(1e\+160\)"),
            ("huge_obs", r"gave an observation that is beyond 1e\+100"),
            ("obs_shape", r"returned float64\[3\] as its observation, its observation_space says float64\[4\]"),
            ("obs_dtype", r"returned float32\[4\] as its observation, its observation_space says float64\[4\]"),
            ("obs_list", "returned a list as its observation"),
            ("reward_shape", r"returned float64\[1\] as its reward: return a scalar"),
            ("reward_text", r"returned a str as its reward: return a scalar"),
            ("no_flag", r"returned None as truncated: return True or False"),
            ("no_info", r"returned None as its info: return a dict"),
            ("exit", r"raised SystemExit: 7 \(.*faulty_envs\.py:\d+\)$"),
            ("raise", r"raised ZeroDivisionError: pole at zero \(.*faulty_envs\.py:\d+\)$"),
            ("unpicklable", r"raised Unpicklable: held by a lock \(.*faulty_envs\.py:\d+\)$"),
        ],
    )
    def test_named_with_environment_and_step(self, fault: str, message: str) -> None:
        envs = make_envs(tiny("Faulty", fault=fault, seed=8, at=3), [6, 7, 8])
        check_fault(envs, message)

    @pytest.mark.parametrize("fault", ["nan_reward", "unpicklable"])
    def test_workers_report_the_same(self, fault: str) -> None:
        settings = {"fault": fault, "seed": 8, "at": 3}
        envs = make_envs(config("faulty_envs:Faulty-v0", "gymnasium-async", 2, kwargs=settings), [6, 7, 8])
        message = {
            "nan_reward": "gave a reward that is not finite",
            "unpicklable": r"raised Unpicklable: held by a lock \(.*faulty_envs\.py:\d+\)$",
        }
        cause = check_fault(envs, message[fault])
        assert "in step" in str(cause)  # the worker's traceback, as text

    def test_the_place_named_is_the_users_own(self) -> None:
        """Not in numpy, where it was raised: whose code called it with nothing."""
        check_fault(
            make_envs(tiny("Faulty", fault="deep", seed=8, at=3), [6, 7, 8]),
            r"raised ValueError: need at least one array to stack \(.*faulty_envs\.py:\d+\)$",
        )

    def test_the_original_exception_is_chained(self) -> None:
        cause = check_fault(make_envs(tiny("Faulty", fault="raise", seed=8, at=3), [6, 7, 8]), "raised Zero")
        assert isinstance(cause, ZeroDivisionError)

    def test_nan_in_a_reset_is_named(self) -> None:
        envs = make_envs(tiny("Faulty", fault="nan_reset", seed=1), [0, 1])
        with pytest.raises(EnvError, match="environment 1, step 0 of its episode, gave a first observation"):
            envs.reset()

    def test_infinite_observation_bounds_are_fine(self) -> None:
        assert not make_envs(tiny("Counting"), [0]).single_observation_space.is_bounded()


def check_fault(envs: Any, message: str) -> BaseException | None:
    """Steps three times; the third has to fail in environment 2. Returns the cause given."""
    envs.reset()
    action = torch.zeros(3, 1, dtype=torch.int64)
    for _ in range(2):
        envs.step(action)
    with pytest.raises(EnvError, match=rf"^environment 2, step 3 of its episode, {message}") as caught:
        envs.step(action)
    assert "\n" not in str(caught.value)
    envs.close()
    return caught.value.__cause__


REPLAYED = [
    ("CartPole-v1", 100),
    ("Pendulum-v1", 330),
    ("Acrobot-v1", 510),
    ("MountainCarContinuous-v0", 1010),
    ("LunarLander-v3", 200),
    ("LunarLanderContinuous-v3", 200),
    ("BipedalWalker-v3", 150),
    ("Hopper-v5", 200),
    ("Ant-v5", 200),
    ("Humanoid-v5", 100),
]


class TestExactResume:
    @pytest.mark.parametrize(("env_id", "steps"), REPLAYED)
    def test_goes_on_to_the_bit_in_the_other_backend(self, env_id: str, steps: int) -> None:
        envs = make_envs(config(env_id), SEEDS[:2])
        assert envs.exact_resume
        before, after = random_actions(envs.single_action_space, steps + 300, 2).split([steps, 300])
        envs.reset()
        ends = 0
        for action in before:
            step = envs.step(action)
            ends += int((step.terminated | step.truncated).sum())
        assert ends > 0  # at least one reset without a seed
        state = through_json(envs.state_dict())
        restored = make_envs(config(env_id, "gymnasium-async", 1), [1, 2])
        assert torch.equal(restored.load_state_dict(state), step.reset_obs)
        for action in after:
            a, b = envs.step(action), restored.step(action)
            for name in ("next_obs", "reset_obs", "reward", "terminated", "truncated"):
                assert torch.equal(getattr(a, name), getattr(b, name)), name
        assert_same_state(through_json(restored.state_dict())["envs"], through_json(envs.state_dict())["envs"])
        restored.close()

    def test_whatever_the_number_of_workers(self) -> None:
        three, two = (make_envs(config("CartPole-v1", "gymnasium-async", n), SEEDS) for n in (3, 2))
        three.reset()
        before, after = random_actions(three.single_action_space, 120, 3).split([60, 60])
        for action in before:
            three.step(action)
        two.load_state_dict(through_json(three.state_dict()))
        for action in after:
            assert torch.equal(three.step(action).reset_obs, two.step(action).reset_obs)
        three.close()
        two.close()

    def test_before_the_end_of_the_first_episode(self) -> None:
        envs = make_envs(config("CartPole-v1"), SEEDS)
        envs.reset()
        state = envs.state_dict()
        restored = make_envs(config("CartPole-v1"), [1, 2, 3])
        restored.load_state_dict(state)
        for action in random_actions(envs.single_action_space, 60, 3):
            assert torch.equal(envs.step(action).reset_obs, restored.step(action).reset_obs)

    def test_long_episodes_outgrow_the_first_log(self) -> None:
        envs = make_envs(tiny("Counting", length=2000), [0])
        envs.reset()
        for _ in range(1000):
            envs.step(torch.zeros(1, 1, dtype=torch.int64))
        restored = make_envs(tiny("Counting", length=2000), [9])
        state = envs.state_dict()
        state["envs"][0]["obs"][0] = 0  # a fresh process counts its episodes anew
        assert restored.load_state_dict(state)[0, 1] == 1000

    def test_a_state_is_no_view_of_the_running_environments(self) -> None:
        envs = make_envs(tiny("Counting", length=2), [0])
        envs.reset()
        envs.step(torch.zeros(1, 1, dtype=torch.int64))
        state = envs.state_dict()
        for _ in range(2):  # into the next episode, whose log starts over
            envs.step(torch.ones(1, 1, dtype=torch.int64))
        assert state["envs"][0]["obs"][:2].tolist() == [0, 1]
        assert state["envs"][0]["actions"].tolist() == [[0]]

    @pytest.mark.parametrize("backend", ["gymnasium", "gymnasium-async"])
    @pytest.mark.parametrize(
        ("fault", "why"),
        [
            ("OwnRandomness", "environment 1 did not come back to its recorded observation .* random numbers outside"),
            ("Miser", "environment 1 did not come back to its recorded return .* keeps state across resets"),
            (
                "Amnesiac",
                r"environment 1 raised RuntimeError: seen it all \(.*faulty_envs.py:\d+\) while its episode was",
            ),
        ],
    )
    def test_what_cannot_be_replayed_begins_new_episodes_and_says_why(
        self, fault: str, why: str, backend: str, tmp_path: Path
    ) -> None:
        kwargs = {"only": 6, "marker": str(tmp_path / "marker")}
        settings = EnvConfig(id=f"faulty_envs:{fault}-v0", backend=backend, workers=2, kwargs=kwargs)
        warnings: list[str] = []
        envs, anew = (make_envs(settings, [5, 6], on_warning=warnings.append) for _ in range(2))
        action = torch.zeros(2, 1, dtype=torch.int64)
        first = envs.reset().clone()
        for _ in range(2):
            envs.step(action)
        obs = anew.load_state_dict(through_json(envs.state_dict())).clone()
        assert envs.exact_resume and not anew.exact_resume
        (warning,) = warnings
        assert re.fullmatch(f"{why}.*; the run goes on with new episodes", warning)
        assert obs[:, 1].tolist() == [0, 0] and not (obs[:, 0] == first[:, 0]).any()  # with seeds of their own
        assert anew.step(action).next_obs.tolist() == [[obs[0, 0], 1], [obs[1, 0], 1]]
        envs.close()
        anew.close()

    def test_an_old_generator_of_numpys_is_restored_too(self) -> None:
        envs, restored = (make_envs(tiny("OldGenerator"), [seed]) for seed in (3, 4))
        envs.reset()
        actions = random_actions(envs.single_action_space, 60, 1)
        for action in actions[:31]:  # some episodes later, whose reset had no seed
            envs.step(action)
        restored.load_state_dict(through_json(envs.state_dict()))
        assert restored.exact_resume
        for action in actions[31:]:
            assert torch.equal(envs.step(action).reset_obs, restored.step(action).reset_obs)

    def test_one_whose_generator_is_nobody_knows_what_trains_and_is_not_restored(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        envs, restored = (make_envs(tiny("OldGenerator", known=False), [seed]) for seed in (3, 4))
        envs.reset()
        for action in random_actions(envs.single_action_space, 31, 1):
            envs.step(action)
        restored.load_state_dict(through_json(envs.state_dict()))
        assert not restored.exact_resume and "did not come back" in caplog.text

    def test_whose_world_outlives_its_reset_starts_each_episode_anew_under_other_names_too(self) -> None:
        from gymnasium.envs.box2d import BipedalWalker

        class MyWalker(BipedalWalker):
            pass

        assert needs_fresh_environment(MyWalker()) and not needs_fresh_environment(faulty_envs.Counting())

    def test_another_number_of_environments_is_refused(self) -> None:
        envs = make_envs(tiny("Counting"), [0, 1])
        envs.reset()
        with pytest.raises(EnvError, match="the state holds 2 environments, this run has 1"):
            make_envs(tiny("Counting"), [0]).load_state_dict(envs.state_dict())

    def test_another_action_space_is_refused(self) -> None:
        envs = make_envs(config("CartPole-v1"), [0])
        envs.reset()
        with pytest.raises(EnvError, match="the recorded actions are int64"):
            make_envs(config("Pendulum-v1"), [0]).load_state_dict(envs.state_dict())

    def test_no_state_before_the_first_reset(self) -> None:
        with pytest.raises(RuntimeError, match="before the first reset"):
            make_envs(tiny("Counting"), [0]).state_dict()


def through_json(state: dict[str, Any]) -> dict[str, Any]:
    """The state after its plain values went through JSON, as a checkpoint stores them; arrays stay arrays."""
    arrays: list[np.ndarray] = []

    def pack(value: Any) -> Any:
        assert isinstance(value, np.ndarray), f"{type(value)} is neither JSON nor an array"
        arrays.append(value)
        return {"array": len(arrays) - 1}

    text = json.dumps(state, default=pack)
    return json.loads(text, object_hook=lambda d: arrays[d["array"]] if set(d) == {"array"} else d)


def assert_same_state(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> None:
    for left, right in zip(a, b, strict=True):
        assert (left["seed"], left["rng"]) == (right["seed"], right["rng"])
        assert np.array_equal(left["actions"], right["actions"]) and np.array_equal(left["obs"], right["obs"])


class TestVectorEnvAdapter:
    @staticmethod
    def counting(mode: AutoresetMode, lengths: tuple[int, ...] = (2, 3)) -> VectorEnvAdapter:
        makers = [lambda n=n: faulty_envs.Counting(length=n) for n in lengths]
        return VectorEnvAdapter(SyncVectorEnv(makers, autoreset_mode=mode, copy=False), seed=0)

    @pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.DISABLED])
    def test_modes_without_reset_rows_match_the_shard(self, mode: AutoresetMode) -> None:
        envs = self.counting(mode, (3, 3))
        oracle = make_envs(tiny("Counting", length=3), [0, 1])
        assert torch.equal(envs.reset(), oracle.reset())
        assert not envs.exact_resume
        action = torch.zeros(2, 1, dtype=torch.int64)
        for _ in range(8):
            step, expected = envs.step(action), oracle.step(action)
            for name in ("next_obs", "reset_obs", "reward", "terminated", "truncated", "valid", "success"):
                a, b = getattr(step, name), getattr(expected, name)
                assert torch.equal(a.nan_to_num(-1.0), b.nan_to_num(-1.0)) if a.is_floating_point() else a.equal(b), (
                    name
                )

    @pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.DISABLED])
    def test_environments_end_apart(self, mode: AutoresetMode) -> None:
        envs = self.counting(mode)
        envs.reset()
        step = [envs.step(torch.zeros(2, 1, dtype=torch.int64)) for _ in range(2)][-1]
        assert step.truncated.tolist() == [True, False]
        assert step.next_obs[:, :2].tolist() == [[0, 2], [0, 2]]
        assert step.reset_obs[:, :2].tolist() == [[1, 0], [0, 2]]

    def test_rows_after_an_end_are_resets_in_next_step_mode(self) -> None:
        envs = self.counting(AutoresetMode.NEXT_STEP)
        envs.reset()
        seen = []
        for _ in range(5):
            step = envs.step(torch.zeros(2, 1, dtype=torch.int64))
            seen.append(
                [(*step.next_obs[i, :2].tolist(), bool(step.truncated[i]), bool(step.valid[i])) for i in (0, 1)]
            )
            assert torch.equal(step.reward, step.valid.double())
            assert torch.equal(step.reset_obs, step.next_obs)
        assert [rows[0] for rows in seen] == [
            (0, 1, False, True),
            (0, 2, True, True),
            (1, 0, False, False),
            (1, 1, False, True),
            (1, 2, True, True),
        ]
        assert [rows[1][3] for rows in seen] == [True, True, True, False, True]

    def test_success_at_the_end_in_next_step_mode(self) -> None:
        envs = self.counting(AutoresetMode.NEXT_STEP)
        envs.reset()
        success = [envs.step(torch.zeros(2, 1, dtype=torch.int64)).success.tolist() for _ in range(3)]
        assert np.array_equal(success, [[np.nan] * 2, [1.0, np.nan], [np.nan, 1.0]], equal_nan=True)

    @pytest.mark.parametrize(
        ("given", "success"), [(True, 1.0), (np.float32(0.5), 0.5), (np.array([1]), 1.0), (None, np.nan)]
    )
    @pytest.mark.parametrize("key", ["is_success", "success"])
    def test_success_is_a_number_or_none(self, key: str, given: Any, success: float) -> None:
        assert np.array_equal(success_of({key: given}), success, equal_nan=True)

    def test_the_first_name_of_success_comes_first(self) -> None:
        assert success_of({"success": 0.0, "is_success": 1.0}) == 1.0
        for other in ("on Sundays", 7, -1.5, {"goal": 1.0}):  # it means something else there
            assert np.isnan(success_of({"success": other}))
        assert np.isnan(success_of({}))

    @pytest.mark.parametrize("given", ["yes", np.ones(2), {}])
    def test_success_of_another_kind_is_named(self, given: Any) -> None:
        with pytest.raises(ReturnError, match=r"info with .is_success.: .*: report True, False or a number"):
            success_of({"is_success": given})

    @pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
    @pytest.mark.parametrize(("given", "expected"), [({"goal": 1.0}, np.nan), (True, 1.0), (0.25, 0.25), (7, np.nan)])
    def test_success_by_its_second_name(self, mode: AutoresetMode, given: Any, expected: float) -> None:
        class Told(faulty_envs.Drawing):
            def step(self, action: Any) -> Any:
                *step, truncated, _ = super().step(action)
                return *step, truncated, {"success": given} if truncated else {}

        envs = VectorEnvAdapter(SyncVectorEnv([Told, Told], autoreset_mode=mode))
        envs.reset()
        success = [envs.step(torch.zeros(2, 1, dtype=torch.int64)).success.tolist() for _ in range(5)][-1]
        assert np.array_equal(success, [expected] * 2, equal_nan=True)

    def test_what_it_raises_is_named(self) -> None:
        class Failing(SyncVectorEnv):
            def step(self, actions: Any) -> Any:
                raise RuntimeError("simulator fell over")

        envs = VectorEnvAdapter(Failing([faulty_envs.Drawing], autoreset_mode=AutoresetMode.NEXT_STEP))
        envs.reset()
        with pytest.raises(
            EnvError, match=r"after 0 steps, raised RuntimeError: simulator fell over \(.*test_envs.py:\d+"
        ):
            envs.step(torch.zeros(1, 1, dtype=torch.int64))

    def test_dict_observations_and_start_offset(self) -> None:
        space = Dict(b=Box(-1, 1, (2,)), a=Discrete(3))
        make = lambda: faulty_envs.Observing(space)  # noqa: E731
        envs = VectorEnvAdapter(SyncVectorEnv([make] * 2, autoreset_mode=AutoresetMode.SAME_STEP), seed=4)
        obs = envs.reset()
        space.seed(4)
        expected = [gymnasium.spaces.flatten(space, space.sample())]
        assert torch.equal(obs[0], torch.from_numpy(np.stack(expected))[0].float())
        echo = SyncVectorEnv([lambda: faulty_envs.Echo(Discrete(3, start=5))] * 2)
        adapted = VectorEnvAdapter(echo)
        adapted.reset()
        assert adapted.step(torch.tensor([[0], [2]])).next_obs.tolist() == [[5.0], [7.0]]

    def test_gymnasiums_own_vector_environment(self) -> None:
        make = lambda: gymnasium.make_vec("CartPole-v1", num_envs=2, vectorization_mode="vector_entry_point")  # noqa: E731
        envs, raw = VectorEnvAdapter(make(), seed=1), make()
        assert np.array_equal(envs.reset(), raw.reset(seed=1)[0])
        ended = np.zeros(2, bool)
        for _ in range(40):
            step = envs.step(torch.ones(2, 1, dtype=torch.int64))
            obs, reward, terminated, truncated, _ = raw.step(np.ones(2, np.int64))
            assert np.array_equal(step.next_obs, obs) and np.array_equal(step.valid, ~ended)
            assert np.array_equal(step.reward, np.where(ended, 0, reward))
            ended = terminated | truncated
        envs.close()

    def test_a_reset_row_earns_nothing_whatever_the_environment_says(self) -> None:
        class Generous(SyncVectorEnv):
            def step(self, actions: Any) -> Any:
                obs, reward, terminated, truncated, infos = super().step(actions)
                return obs, reward + 5.0, terminated, truncated, infos

        envs = VectorEnvAdapter(Generous([lambda: faulty_envs.Counting(length=1)]))
        envs.reset()
        rewards = [envs.step(torch.zeros(1, 1, dtype=torch.int64)).reward.item() for _ in range(4)]
        assert rewards == [6.0, 0.0, 6.0, 0.0]

    def test_nan_is_named(self) -> None:
        makers = [lambda seed=seed: faulty_envs.Faulty("nan_reward", seed) for seed in (9, 1)]
        envs = VectorEnvAdapter(SyncVectorEnv(makers), seed=0)
        envs.reset()
        envs.step(torch.zeros(2, 1, dtype=torch.int64))
        with pytest.raises(EnvError, match=r"environment 1, after 2 steps, gave a reward that is not finite"):
            envs.step(torch.zeros(2, 1, dtype=torch.int64))

    @pytest.mark.parametrize("seed", [3, [3, 4]])
    def test_a_restored_one_begins_other_episodes_than_before(self, seed: Any) -> None:
        def first(steps: int | None) -> list[float]:
            envs = VectorEnvAdapter(gymnasium.make_vec("CartPole-v1", num_envs=2, vectorization_mode="sync"), seed=seed)
            obs = envs.reset() if steps is None else envs.load_state_dict({"steps": steps})
            return obs.flatten().tolist()

        begun = [first(steps) for steps in (None, 5, 6)]
        assert begun[0] != begun[1] != begun[2] != begun[0]
        assert first(5) == begun[1]

    def test_a_failing_reset_is_an_environments_failure(self) -> None:
        envs = VectorEnvAdapter(SyncVectorEnv([faulty_envs.Counting]))
        envs._env.reset = None
        with pytest.raises(EnvError, match="the vector environment, in reset, raised TypeError"):
            envs.reset()

    def test_a_failing_reset_at_an_episodes_end_is_one_too(self) -> None:
        envs = self.counting(AutoresetMode.DISABLED)
        envs.reset()
        envs._env.reset = None
        with pytest.raises(EnvError, match=r"the vector environment, after 2 steps, in reset, raised TypeError"):
            for _ in range(2):
                envs.step(torch.zeros(2, 1, dtype=torch.int64))

    def test_an_undeclared_mode_is_refused(self) -> None:
        raw = SyncVectorEnv([faulty_envs.Counting])
        raw.metadata = {}
        with pytest.raises(EnvError, match="autoreset_mode None"):
            VectorEnvAdapter(raw)


def test_a_shard_numbers_its_environments_from_its_first() -> None:
    with pytest.raises(EnvError, match=r"^environment 40: "):
        EnvShard(config("Pendulum-v1", kwargs={"gravitas": 1}), [0], first_index=40)
