"""Evaluation against plain Gymnasium loops, and the command that prints it."""

from __future__ import annotations

import ctypes.util
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gymnasium
import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from commands import command, config_for, one_line, random_policy, run_process, run_script, saved_policy
from gymnasium.spaces import Box, Discrete

from trpo.config import EnvConfig, WrapperConfig
from trpo.envs import make_single_env
from trpo.envs.spaces import ActionEncoding
from trpo.errors import EnvError, UserError
from trpo.evaluation import SIDE_BY_SIDE, Evaluation, evaluate
from trpo.evaluation.video import render_headless
from trpo.policy import Policy
from trpo.run.saved_policy import SavedPolicy
from trpo.trainer import Trainer

HERE = Path(__file__).resolve().parent


class Task(gymnasium.Env[Any, Any]):
    """Observes random numbers; reports success in episodes of an even seed; shows a `fault` at its third step."""

    observation_space = Box(-10, 10, (4,), np.float32)
    action_space = Discrete(2)
    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}  # noqa: RUF012 - as Gymnasium declares it

    def __init__(self, fault: str | None = None, render_mode: str | None = None) -> None:
        self.fault, self.render_mode = fault, render_mode
        if fault == "no_modes":
            self.metadata = {}

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.steps, self.seed = 0, seed or 0
        if self.fault == "old_reset":
            return np.zeros(4, np.float32)
        return self.np_random.normal(size=4).astype(np.float32), {}

    def step(self, action: Any) -> Any:
        self.steps += 1
        obs, reward = self.np_random.normal(size=4).astype(np.float32), float(action)
        over = self.steps == 6 and self.fault != "endless"
        if self.steps == 3 and self.fault == "nan_obs":
            obs *= np.nan
        if self.steps == 3 and self.fault == "nan_reward":
            reward = np.nan
        if self.steps == 3 and self.fault == "raise":
            raise ZeroDivisionError("pole at zero")
        if self.fault == "old_step":
            return obs, reward, over, {}
        return obs, reward, over, False, {"is_success": self.seed % 2 == 0} if over else {}

    def render(self) -> Any:
        if self.fault == "no_screen":
            raise OSError("no display")
        return np.full((32, 48, 3), 40 * self.steps, np.uint8)


class Shown(Task):
    """Counts the windows that are open, and remembers which episodes they showed."""

    metadata = {"render_modes": ["human"], "render_fps": 20}  # noqa: RUF012
    windows = 0
    episodes: list[int] = []  # noqa: RUF012 - of all of them

    def __init__(self, render_mode: str | None = None) -> None:
        super().__init__(render_mode=render_mode)
        Shown.windows += render_mode == "human"

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        if self.render_mode == "human":
            assert Shown.windows == 1
            Shown.episodes.append(seed or 0)
        return super().reset(seed=seed)

    def close(self) -> None:
        Shown.windows -= self.render_mode == "human"


gymnasium.register("EvaluationTask-v0", Task)
gymnasium.register("ShownTask-v0", Shown)


def policy_for(env_id: str, **kwargs: Any) -> tuple[Policy, EnvConfig, gymnasium.Space[Any]]:
    """Arguments of `evaluate`, for a random policy whose episodes differ from each other."""
    config = config_for(env_id, env={"id": env_id, "kwargs": kwargs})
    env = gymnasium.make(env_id, **kwargs)
    assert env.observation_space.shape is not None
    policy = random_policy(config, env.observation_space.shape[0], env.action_space, seed=5)
    env.close()
    return policy, config.env, env.action_space


def plain_loop(env_id: str, act: Any, seed: int) -> tuple[float, int]:
    """Return and length of one episode, as anybody would write it."""
    env = gymnasium.make(env_id)
    obs, _ = env.reset(seed=seed)
    total, steps, over = 0.0, 0, False
    while not over:
        obs, reward, terminated, truncated, _ = env.step(act(obs))
        total, steps, over = total + float(reward), steps + 1, terminated or truncated
    env.close()
    return total, steps


def test_returns_are_those_of_a_plain_loop_that_calls_act(tmp_path):
    """Exact: with discrete actions, rounding would have to fall on a tie to matter."""
    policy, env, space = policy_for("CartPole-v1")
    saved = SavedPolicy(policy, config_for(), None, space, {}, tmp_path)
    result = evaluate(policy, env, space, episodes=5, seed=11)
    expected = [plain_loop("CartPole-v1", saved.act, seed) for seed in range(11, 16)]
    assert [*zip(result.returns, result.lengths, strict=True)] == expected
    assert len(set(result.lengths)) > 1


@pytest.mark.parametrize("env_id", ["Hopper-v5", "Pendulum-v1"])
def test_returns_with_continuous_actions_are_those_of_a_plain_loop_to_the_bit(env_id):
    """The loop's forward pass has as many rows as ours: the last bits of a product depend on the matrix's size."""
    policy, env, space = policy_for(env_id)
    encoding = ActionEncoding.of(space)

    def act_in_row(row: int) -> Any:
        def act(obs: np.ndarray) -> np.ndarray:
            block = torch.zeros(SIDE_BY_SIDE, len(obs), dtype=torch.float64)
            block[row] = torch.from_numpy(obs)
            return encoding.native(policy.mode(block).numpy()[row : row + 1]).reshape(space.shape)

        return act

    result = evaluate(policy, env, space, episodes=3, seed=2)
    expected = [plain_loop(env_id, act_in_row(i), 2 + i) for i in range(3)]
    assert [*zip(result.returns, result.lengths, strict=True)] == expected


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("env_id", ["Hopper-v5", "CartPole-v1"])
def test_an_episode_does_not_depend_on_those_beside_it(env_id, deterministic):
    policy, env, space = policy_for(env_id)
    many = evaluate(policy, env, space, episodes=7, seed=4, deterministic=deterministic)
    few = evaluate(policy, env, space, episodes=2, seed=4, deterministic=deterministic)
    assert many.returns[:2] == few.returns and many.lengths[:2] == few.lengths
    assert many.returns[0] != many.returns[1]


def test_more_episodes_than_fit_side_by_side_continue_the_seeds():
    policy, env, space = policy_for("EvaluationTask-v0")
    many = evaluate(policy, env, space, episodes=SIDE_BY_SIDE + 2, seed=4, deterministic=False)
    rest = evaluate(policy, env, space, episodes=2, seed=4 + SIDE_BY_SIDE, deterministic=False)
    assert len(many.returns) == SIDE_BY_SIDE + 2
    assert many.returns[SIDE_BY_SIDE:] == rest.returns


def test_an_episode_is_a_function_of_its_seed():
    """Its action noise too: the same seed in another row, as another episode. Discrete, so that no rounding shows."""
    policy, env, space = policy_for("EvaluationTask-v0")
    long = evaluate(policy, env, space, episodes=6, seed=4, deterministic=False)
    late = evaluate(policy, env, space, episodes=4, seed=6, deterministic=False)
    assert long.returns[2:] == late.returns
    assert len(set(long.returns)) > 1


def test_samples_repeat_with_the_seed_and_are_not_the_mode():
    policy, env, space = policy_for("Pendulum-v1")
    first, again, mode = (
        evaluate(policy, env, space, episodes=2, seed=1, deterministic=d).returns for d in (False, False, True)
    )
    assert first == again
    assert first != mode


def test_the_policy_is_left_as_it_was():
    policy, env, space = policy_for("EvaluationTask-v0")
    before = {key: value.clone() for key, value in policy.state_dict().items()}
    evaluate(policy, env, space, episodes=2, seed=0)
    assert all(torch.equal(value, before[key]) for key, value in policy.state_dict().items())


def test_figures_are_those_of_the_episodes():
    result = Evaluation([1.0, 2.0, 6.0], [3, 4, 8], [1.0, 0.0])
    assert (result.mean, result.median, result.mean_length) == (3.0, 2.0, 5.0)
    assert result.std == statistics.pstdev([1.0, 2.0, 6.0])  # of these episodes, not an estimate over others
    assert result.metrics() == {
        "eval/mean_reward": 3.0,
        "eval/std_reward": result.std,
        "eval/median_reward": 2.0,
        "eval/mean_ep_length": 5.0,
        "eval/episodes": 3.0,
        "eval/success_rate": 0.5,
    }
    assert str(result) == "return 3 ± 2.16 (median 2), length 5, 3 episodes, success 50%"
    assert "eval/success_rate" not in Evaluation([1.0], [1]).metrics()


def test_successes_are_those_reported_at_the_end():
    result = evaluate(*policy_for("EvaluationTask-v0"), episodes=5, seed=0)
    assert result.successes == [1.0, 0.0, 1.0, 0.0, 1.0]
    assert result.lengths == [6] * 5


def test_an_episode_without_end_is_cut():
    policy, env, space = policy_for("EvaluationTask-v0", fault="endless")
    result = evaluate(policy, env, space, episodes=2, seed=0, max_episode_steps=40)
    assert result.lengths == [40, 40] and str(result).endswith("2 episodes, 2 of them cut after 40 steps")
    assert result.metrics()["eval/cut_episodes"] == 2
    many = evaluate(policy, env, space, episodes=SIDE_BY_SIDE + 2, seed=0, max_episode_steps=3)
    assert many.cut == SIDE_BY_SIDE + 2
    limited = WrapperConfig(name="gymnasium.wrappers:TimeLimit", kwargs={"max_episode_steps": 60})
    result = evaluate(
        policy, env.model_copy(update={"wrappers": (limited,)}), space, episodes=2, seed=0, max_episode_steps=40
    )
    assert (result.lengths, result.cut) == ([60, 60], 0)


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        ("nan_obs", "3 steps into the episode with seed 8, gave an infinite or undefined observation"),
        ("nan_reward", "3 steps into the episode with seed 8, gave an infinite or undefined reward"),
        ("raise", "2 steps into the episode with seed 8, raised ZeroDivisionError: pole at zero"),
    ],
)
def test_a_failing_environment_is_named_with_step_and_seed(fault, problem):
    with pytest.raises(EnvError, match=problem):
        evaluate(*policy_for("EvaluationTask-v0", fault=fault), episodes=1, seed=8)


def test_another_environment_than_the_policys_is_refused():
    policy, _, space = policy_for("CartPole-v1")
    with pytest.raises(EnvError, match="trained on"):
        evaluate(policy, EnvConfig(id="Pendulum-v1"), space, episodes=1, seed=0)
    with pytest.raises(EnvError, match="action space"):
        evaluate(policy, EnvConfig(id="CartPole-v1"), Discrete(2, start=1), episodes=1, seed=0)
    with pytest.raises(ValueError, match="at least 1"):
        evaluate(policy, EnvConfig(id="CartPole-v1"), space, episodes=0, seed=0)


# ---------------------------------------------------------------- videos


# imageio's reader leaves the pipes of its ffmpeg to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_video_shows_the_first_observation_and_every_step(tmp_path):
    file = tmp_path / "new" / "out.mp4"
    result = evaluate(*policy_for("EvaluationTask-v0"), episodes=2, seed=0, video=file)
    with imageio.get_reader(file) as reader:
        frames = [frame.mean() for frame in reader]
        assert reader.get_meta_data()["fps"] == 20
        assert reader.get_meta_data()["size"] == (48, 32)
    assert len(frames) == result.lengths[0] + 1
    # Frame k is grey 40·k; lossy compression of a uniform picture moves it by a few levels.
    np.testing.assert_allclose(frames, 40 * np.arange(7), atol=8)
    assert [path.name for path in file.parent.iterdir()] == ["out.mp4"]


def test_a_video_does_not_change_the_result(tmp_path):
    args = policy_for("CartPole-v1")
    assert evaluate(*args, episodes=2, seed=0, video=tmp_path / "a.mp4") == evaluate(*args, episodes=2, seed=0)


@pytest.mark.parametrize(
    ("fault", "name", "problem"),
    [
        ("raise", "out.mp4", "raised ZeroDivisionError"),
        ("no_screen", "out.mp4", r"cannot be rendered here \(OSError: no display\).*libegl1"),
        ("no_modes", "out.mp4", "EvaluationTask-v0 has no rgb_array among its render modes"),
        (None, "out.gif", "has to end in .mp4"),
        (None, "file/out.mp4", "cannot write"),
        (None, f"{200 * 'x'}.{50 * 'y'}.mp4", r"cannot write .*: File name too long"),
    ],
)
def test_no_video_leaves_no_file(fault, name, problem, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=problem):
        evaluate(*policy_for("EvaluationTask-v0", fault=fault), episodes=1, seed=0, video=tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_missing_video_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "imageio.v2", None)
    with pytest.raises(UserError, match=r"pip install 'trpo\[video\]'"):
        evaluate(*policy_for("EvaluationTask-v0"), episodes=1, seed=0, video=tmp_path / "out.mp4")


@pytest.mark.parametrize(
    ("given", "libraries", "chosen"),
    [
        ({}, {"EGL", "OSMesa"}, "egl"),
        ({}, {"OSMesa"}, "osmesa"),
        ({}, set(), None),
        ({"MUJOCO_GL": "osmesa"}, {"EGL", "OSMesa"}, "osmesa"),
        ({"DISPLAY": ":0"}, {"EGL"}, None),
    ],
)
def test_off_screen_rendering_uses_what_is_installed(given, libraries, chosen, monkeypatch):
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "MUJOCO_GL", "SDL_VIDEODRIVER"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: f"lib{name}.so" if name in libraries else None)
    render_headless()
    assert os.environ.get("MUJOCO_GL") == chosen
    assert ("SDL_VIDEODRIVER" in os.environ) == ("DISPLAY" not in given)


# ---------------------------------------------------------------- windows


@pytest.mark.parametrize("deterministic", [True, False])
def test_what_is_shown_one_after_the_other_is_what_runs_side_by_side(deterministic, monkeypatch):
    monkeypatch.setenv("DISPLAY", ":0")
    args, episodes = policy_for("ShownTask-v0"), SIDE_BY_SIDE + 2
    Shown.episodes.clear()
    shown = evaluate(*args, episodes=episodes, seed=7, deterministic=deterministic, render=True)
    assert Shown.episodes == [*range(7, 7 + episodes)]
    assert shown == evaluate(*args, episodes=episodes, seed=7, deterministic=deterministic)
    assert len(Shown.episodes) == episodes and Shown.windows == 0


def test_what_cannot_be_shown_is_said(monkeypatch, script):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.delenv("DISPLAY", raising=False)
    with pytest.raises(UserError, match=r"no screen.* --video FILE"):
        evaluate(*policy_for("ShownTask-v0"), episodes=1, seed=0, render=True)
    monkeypatch.setenv("DISPLAY", ":0")
    with pytest.raises(UserError, match="EvaluationTask-v0 has no render mode `human`"):
        evaluate(*policy_for("EvaluationTask-v0"), episodes=1, seed=0, render=True)
    outcome = script("somewhere", "--render", "--video", "a.mp4")
    assert outcome.status == 2 and "not allowed with argument" in one_line(outcome.err)


# ---------------------------------------------------------------- the command


@pytest.fixture
def script(capsys, monkeypatch):
    return lambda *args: run_script("evaluate.py", *args, capture=capsys, patch=monkeypatch)


@pytest.fixture
def cartpole(tmp_path):
    space = gymnasium.make("CartPole-v1").action_space
    return saved_policy(tmp_path / "policy", config_for(), 4, space)


def test_command_prints_the_figures(cartpole, script):
    expected = evaluate(
        cartpole.policy, EnvConfig(id="CartPole-v1"), cartpole.action_space, episodes=3, seed=7, deterministic=False
    )
    outcome = script(cartpole.path, "--episodes", 3, "--seed", 7, "--stochastic")
    assert outcome.status == 0 and outcome.err == ""
    assert one_line(outcome.out) == f"CartPole-v1, stochastic: {expected}"


def test_command_evaluates_in_another_variant_of_the_environment(tmp_path, script):
    policy = saved_policy(tmp_path / "policy", config_for("Pendulum-v1"), 3, gymnasium.make("Pendulum-v1").action_space)
    moon = EnvConfig(id="Pendulum-v1", kwargs={"g": 1.6})
    expected = evaluate(policy.policy, moon, policy.action_space, episodes=2, seed=0)
    assert expected != evaluate(policy.policy, policy.config.env, policy.action_space, episodes=2, seed=0)
    for where in ((), ("--env", "Pendulum-v1")):
        outcome = script(policy.path, "--episodes", 2, *where, "--set", "env.kwargs.g=1.6")
        assert outcome.status == 0 and one_line(outcome.out) == f"Pendulum-v1, deterministic: {expected}"


def test_command_asks_nothing_of_settings_that_are_for_training(tmp_path, script):
    """A batch of 90 by 3 environments, which 16 would not divide."""
    env = {"id": "CartPole-v1", "num_envs": 3}
    config = config_for(env=env, batch_size=90, total_steps=90)
    policy = saved_policy(tmp_path / "policy", config, 4, gymnasium.make("CartPole-v1").action_space)
    for where in ((), ("--env", "CartPole-v1")):
        assert script(policy.path, "--episodes", 1, *where, "--set", "env.stagger=false").status == 0


def test_command_says_when_a_run_has_not_ended(tmp_path, script):
    best = saved_policy(tmp_path / "run" / "best", config_for(), 4, gymnasium.make("CartPole-v1").action_space)
    said = f"the run has not ended: this is {best.path}, the best so far, after 4096 steps"
    assert script(tmp_path / "run", "--episodes", 1).out.splitlines()[0] == said
    assert "has not ended" not in script(best.path, "--episodes", 1).out
    config = config_for(total_steps=128, batch_size=64, device="cpu", evaluation={"every_steps": 0})
    run = Trainer(config, root=tmp_path, console=False).train(max_updates=1).directory
    newest = run / "checkpoints" / "step-000000064"
    said = f"the run has not ended: this is {newest}, its newest checkpoint, after 64 steps"
    assert script(run, "--episodes", 1).out.splitlines()[0] == said
    assert "has not ended" not in script(newest, "--episodes", 1).out


def test_command_that_is_terminated_leaves_no_half_of_a_video(cartpole, tmp_path):
    video = tmp_path / "films" / "first.mp4"
    process = subprocess.Popen(command("evaluate.py", cartpole.path, "--episodes", 1_000_000, "--video", video))
    for _ in range(600):
        if video.parent.is_dir() and any(video.parent.iterdir()):
            break
        time.sleep(0.1)
    process.terminate()
    assert process.wait(60) == 128 + signal.SIGTERM
    assert list(video.parent.iterdir()) == []


def test_command_prints_nothing_but_one_json_object(cartpole, tmp_path):
    video = tmp_path / "first.mp4"
    outcome = run_process("evaluate.py", cartpole.path, "--episodes", 2, "--json", "--video", video)
    assert outcome.status == 0, outcome.err
    result = evaluate(cartpole.policy, EnvConfig(id="CartPole-v1"), cartpole.action_space, episodes=2, seed=0)
    assert json.loads(outcome.out) == {
        "policy": str(cartpole.path),
        "env": "CartPole-v1",
        "env_steps": 4096,
        "seed": 0,
        "deterministic": True,
        "episodes": 2,
        "mean": result.mean,
        "std": result.std,
        "median": result.median,
        "mean_length": result.mean_length,
        "returns": result.returns,
        "lengths": result.lengths,
        "successes": result.successes,
        "info": {},
        "cut": 0,
    }
    assert video.stat().st_size > 0


def test_command_errors_are_one_line_and_status_2(cartpole, script, tmp_path):
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "manifest.json").write_text("{}")
    for args, problem in (
        ((tmp_path / "nowhere",), "no such file or directory"),
        ((damaged,), "cannot load"),
        ((cartpole.path, "--env", "Pendulum-v1"), "trained on"),
        ((cartpole.path, "--env", "CartPool-v1"), "did you mean CartPole-v1"),
        ((cartpole.path, "--set", "policy.bins=3"), "only env.* and evaluation.* can differ"),
        ((cartpole.path, "--set", "env.kwarg.g=3"), "did you mean env.kwargs?"),
        ((cartpole.path, "--set", "env.kwargs.g=3"), "cannot be built with env.kwargs {'g': 3}"),
        ((cartpole.path, "--episodes", "0"), "--episodes: give a whole number from 1"),
        ((cartpole.path, "--seed", "-1"), "--seed"),
        ((cartpole.path, "--device", "gpu"), "device 'gpu' is unknown"),
        ((cartpole.path, "--device", "cuda:99"), "CUDA GPUs are available"),
        ((cartpole.path, "--video", "out.avi"), ".mp4"),
        ((), "RUN_OR_POLICY"),
    ):
        outcome = script(*args)
        assert outcome.status == 2 and outcome.out == ""
        assert problem in one_line(outcome.err)


def test_command_imports_what_the_policy_names_only_when_told_to(script, tmp_path, monkeypatch):
    marker = tmp_path / "imported"
    (tmp_path / "foreign_task.py").write_text(
        f"import gymnasium, pathlib\npathlib.Path({str(marker)!r}).touch()\n"
        "gymnasium.register('Foreign-v0', 'test_evaluation:Task')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.syspath_prepend(HERE)
    saved = saved_policy(tmp_path / "policy", config_for("foreign_task:Foreign-v0"), 4, Discrete(2))
    refused = script(saved.path, "--episodes", 2)
    assert refused.status == 2 and "--trust-code" in one_line(refused.err)
    assert not marker.exists()
    allowed = script(saved.path, "--episodes", 2, "--trust-code")
    assert allowed.status == 0 and "2 episodes" in allowed.out
    assert marker.exists()


def test_no_more_environments_are_alive_than_training_has(monkeypatch):
    alive, most = 0, 0

    def counted(*args: Any, **kwargs: Any) -> gymnasium.Env[Any, Any]:
        nonlocal alive, most
        env = make_single_env(*args, **kwargs)
        alive, most, close = alive + 1, max(most, alive + 1), env.close

        def closed() -> None:
            nonlocal alive
            alive -= 1
            close()

        env.close = closed
        return env

    policy, env, space = policy_for("EvaluationTask-v0")
    together = evaluate(policy, env, space, episodes=7, seed=4, deterministic=False)
    monkeypatch.setattr("trpo.evaluation.episodes.make_single_env", counted)
    few = evaluate(policy, env.model_copy(update={"num_envs": 3}), space, episodes=7, seed=4, deterministic=False)
    assert (alive, most) == (0, 3) and few == together


@pytest.mark.parametrize("fault", ["old_reset", "old_step"])
def test_an_environment_of_gyms_old_interface_is_told_of_the_new_one(fault):
    policy, env, space = policy_for("EvaluationTask-v0", fault=fault)
    with pytest.raises(EnvError, match=r"reset\(\) has to return \(observation, info\), and step\(\)"):
        evaluate(policy, env, space, episodes=1, seed=0)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("obs_shape", r"returned float64\[3\] as its observation"),
        ("obs_list", "returned a list as its observation"),
        ("reward_shape", r"returned float64\[1\] as its reward"),
        ("reward_text", "returned a str as its reward"),
        ("no_flag", "returned None as truncated"),
        ("no_info", "returned None as its info"),
        ("exit", r"raised SystemExit: 7 \(.*faulty_envs\.py:\d+\)$"),
    ],
)
def test_what_an_environment_returns_is_checked_as_in_training(fault: str, message: str) -> None:
    arguments = policy_for("faulty_envs:Faulty-v0", fault=fault, seed=5, at=3)
    with pytest.raises(EnvError, match=rf"the environment, \d steps into the episode with seed 5, {message}"):
        evaluate(*arguments, episodes=1, seed=5)
