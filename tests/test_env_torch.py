"""Environments in torch against Gymnasium's own, stepped side by side; their random numbers against plain integers."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from commands import config_for
from gymnasium.spaces import Box, Discrete
from helpers import seeded
from hypothesis import given
from hypothesis import strategies as st
from test_resume import assert_same_run, resume, train

import trpo.collector
import trpo.trainer
from trpo.collector import Collector
from trpo.config import Config, EnvConfig, WrapperConfig
from trpo.envs import make_envs
from trpo.envs.contract import Step
from trpo.envs.spaces import ActionEncoding
from trpo.envs.torch_classic import TASKS
from trpo.envs.torch_random import stream_keys, uniform
from trpo.errors import EnvError
from trpo.policy import Policy, build_policy
from trpo.run.checkpoint import load_state, save_state
from trpo.trainer import Trainer

CPU = torch.device("cpu")
META = torch.device("meta")  # tensors without values: whoever looks at one raises
SEEDS = [11, 7, 2**31 - 1, 0, 12]
EPSILON = 2.0**-52


def config(env_id: str, **settings: Any) -> EnvConfig:
    return EnvConfig(id=env_id, backend="torch", **{"stagger": False} | settings)


def make(env_id: str, seeds: list[int] | None = None, device: torch.device = CPU) -> Any:
    return make_envs(config(env_id), SEEDS if seeds is None else seeds, device=device)


def random_actions(space: Any, steps: int, num_envs: int, seed: int = 0) -> torch.Tensor:
    """[T, N, A] as a policy would encode them; for a Box beyond its bounds too."""
    if isinstance(space, Box):
        return 4 * torch.rand(steps, num_envs, *space.shape, generator=seeded(seed)) - 2
    return torch.randint(int(space.n), (steps, num_envs, 1), generator=seeded(seed))


def native(space: Any, action: torch.Tensor) -> Any:
    """One environment's action [A] as Gymnasium takes it."""
    return np.clip(action.numpy(), space.low, space.high) if isinstance(space, Box) else int(action)


class TestRandomNumbers:
    @given(st.integers(0, 2**64 - 1), st.integers(0, 2**40), st.integers(1, 5))
    def test_are_those_of_splitmix64(self, seed: int, first: int, width: int) -> None:
        found = uniform(stream_keys([seed], CPU), first, 3, width)
        key = finalized(seed)
        expected = [splitmix64(key, n) for n in range(first * width, (first + 3) * width)]
        assert found.flatten().tolist() == [(bits >> 11) / 2**53 for bits in expected]

    def test_of_a_seed_do_not_depend_on_those_beside_it(self) -> None:
        together = uniform(stream_keys(SEEDS, CPU), 5, 7, 4)
        for i, seed in enumerate(SEEDS):
            alone = torch.cat([uniform(stream_keys([seed], CPU), row, 1, 4) for row in range(5, 12)])
            assert torch.equal(together[..., i : i + 1], alone)

    def test_are_uniform_and_uncorrelated(self) -> None:
        """Means of n independent terms lie within 5 standard errors; consecutive seeds are the hardest case."""
        x = uniform(stream_keys(range(1000), CPU), 0, 50, 2)
        n, centred = x.numel(), x - 0.5
        assert abs(float(centred.mean())) < 5 * math.sqrt(1 / 12 / n)
        assert abs(float(centred.square().mean()) - 1 / 12) < 5 * math.sqrt(1 / 180 / n)
        for other in (centred.roll(1, 0), centred.roll(1, 1), centred.roll(1, 2)):
            assert abs(float((centred * other).mean())) < 5 / 12 / math.sqrt(n)


def finalized(z: int) -> int:
    """SplitMix64's output function, in Python's own integers."""
    mask = 2**64 - 1
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
    return z ^ (z >> 31)


def splitmix64(state: int, n: int) -> int:
    """Output n of the generator started in `state`."""
    return finalized((state + (n + 1) * 0x9E3779B97F4A7C15) % 2**64)


def gymnasium_steps(env_id: str, episodes: int) -> Any:
    """Every step of some episodes of random actions, stacked over steps: state, action, and what Gymnasium made of them
    (state, observation, reward, terminated)."""
    env = gymnasium.make(env_id)
    env.action_space.seed(3)
    rows = []
    for seed in range(episodes):
        env.reset(seed=seed)
        ended = False
        while not ended:
            state, action = np.array(env.unwrapped.state), env.action_space.sample()
            obs, reward, terminated, truncated, _ = env.step(action)
            rows.append((state, np.atleast_1d(action), np.array(env.unwrapped.state), obs, float(reward), terminated))
            ended = terminated or truncated
    return (np.stack(column) for column in zip(*rows, strict=True))


class TestAgainstGymnasium:
    @pytest.mark.parametrize("env_id", TASKS)
    def test_the_same_spaces_and_time_limit(self, env_id: str) -> None:
        env, task = gymnasium.make(env_id), TASKS[env_id]
        assert task.observation_space == env.observation_space and task.action_space == env.action_space
        assert task.observation_space.dtype == env.observation_space.dtype
        assert env.spec is not None and task.time_limit == env.spec.max_episode_steps

    @pytest.mark.parametrize(("env_id", "exact"), [("Pendulum-v1", []), ("CartPole-v1", [0, 2])])
    def test_one_step_from_the_same_state(self, env_id: str, exact: list[int]) -> None:
        """`exact` are the state components that neither sine nor cosine enters."""
        task = TASKS[env_id]
        state, action, new_state, obs, reward, terminated = gymnasium_steps(env_id, 20)
        found, found_reward, found_end = task.advance(torch.from_numpy(state.T.copy()), torch.from_numpy(action))
        assert np.array_equal(found[exact].numpy(), new_state.T[exact])
        # Sines of one ulp more or less move the rates by at most 15 · dt · ε; then rounding of sums of order 10.
        np.testing.assert_allclose(found.numpy(), new_state.T, rtol=0, atol=16 * EPSILON)
        assert found_reward.dtype == torch.float64
        # NumPy squares scalars by its pow, one ulp beside the product: in float32 for the torque, 0.004 at most.
        np.testing.assert_allclose(found_reward.numpy(), reward, rtol=4 * EPSILON, atol=2 * 0.004 * 2.0**-23)
        assert np.array_equal(found_end.numpy(), terminated)
        seen = task.observe(torch.from_numpy(new_state.T.copy())).numpy()
        assert seen.dtype == obs.dtype
        np.testing.assert_array_max_ulp(seen, obs, maxulp=1)  # float32 of cosines that differ in the last of 53 bits

    @pytest.mark.parametrize(
        "space", [Discrete(3, start=-1), Discrete(2), Box(0, 5, (2,), np.int64), Box(-1, 2, (2,), np.float32)]
    )
    def test_a_task_is_given_the_actions_that_gymnasiums_would_be(self, space: Any, monkeypatch: Any) -> None:
        """An offset is added, an integer Box rounds half to even, and all of it is clipped."""
        given = []

        def advance(state: torch.Tensor, action: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            given.append(action)
            return state, state[0], state[0] > 2

        task = replace(TASKS["Pendulum-v1"], action_space=space, advance=advance)
        monkeypatch.setitem(TASKS, "Pendulum-v1", task)
        envs = make("Pendulum-v1")
        envs.reset()
        halves = 0.5 * torch.arange(-4.0, 16.0).view(2, -1).T[: len(SEEDS)] if isinstance(space, Box) else None
        action = torch.randint(int(space.n), (len(SEEDS), 1)) if halves is None else halves
        envs.step(action)
        expected = ActionEncoding.of(space).native(action.numpy())
        assert given[0].numpy().dtype == expected.dtype and np.array_equal(given[0].numpy(), expected)

    @pytest.mark.parametrize("component", [0, 2])
    @pytest.mark.parametrize("sign", [-1, 1])
    def test_a_cart_or_pole_ends_its_episode_beyond_its_limit_only(self, component: int, sign: int) -> None:
        limit, env = {0: 2.4, 2: math.radians(12)}[component], gymnasium.make("CartPole-v1")
        env.reset()
        for distance, speed in ((1.0, 0.0), (1 - 1e-9, 0.0), (1 + 1e-9, 0.0), (0.99, 9.0), (1.01, -9.0)):
            state = np.zeros(4)
            state[component : component + 2] = sign * distance * limit, sign * speed * limit
            env.unwrapped.state, env.unwrapped.steps_beyond_terminated = state, None
            _, _, terminated, _, _ = env.step(0)
            _, _, found = TASKS["CartPole-v1"].advance(torch.from_numpy(state)[:, None], torch.tensor([[0]]))
            assert bool(found) == terminated
        assert not terminated  # it came back

    @pytest.mark.parametrize("env_id", TASKS)
    def test_whole_episodes_of_random_actions(self, env_id: str) -> None:
        """From Gymnasium's own first states. A pole falls within 2 s, a pendulum swings: errors of 1e-16 a step grow
        by e⁸ = 3e3 at most, and there are 200 steps; 1e-9 leaves room for a passage near the upright."""
        env, task = gymnasium.make(env_id), TASKS[env_id]
        env.action_space.seed(0)
        for seed in range(10):
            env.reset(seed=seed)
            state = torch.from_numpy(np.array(env.unwrapped.state))[:, None]
            ended = False
            while not ended:
                action = env.action_space.sample()
                _, reward, terminated, truncated, _ = env.step(action)
                state, found, end = task.advance(state, torch.from_numpy(np.atleast_1d(action))[None])
                np.testing.assert_allclose(state[:, 0], env.unwrapped.state, rtol=0, atol=1e-9)
                assert float(found) == pytest.approx(float(reward), abs=1e-8) and bool(end) == terminated
                ended = terminated or truncated

    def test_a_balanced_pole_is_truncated_after_500_steps(self) -> None:
        """Each side balances by its own observations, which keeps rounding from growing."""

        def balance(obs: Any) -> int:
            return int(0.1 * obs[0] + 0.5 * obs[1] + 10 * obs[2] + 2 * obs[3] > 0)

        envs, env = make("CartPole-v1", [5]), gymnasium.make("CartPole-v1")
        obs = envs.reset()
        env.reset()
        env.unwrapped.state = envs.state_dict()["state"][:, 0].numpy()
        expected = obs[0].numpy()
        for t in range(1, 501):
            step = envs.step(torch.tensor([[balance(obs[0])]]))
            expected, _, terminated, truncated, _ = env.step(balance(expected))
            # One unit in the last place of a float32 of order 1, for the rounding of values that agree to 1e-12.
            np.testing.assert_allclose(step.next_obs[0], expected, rtol=0, atol=2.0**-23)
            assert (bool(step.terminated), bool(step.truncated)) == (terminated, truncated) == (False, t == 500)
            obs = step.reset_obs


class TestEpisodes:
    @pytest.mark.parametrize("env_id", TASKS)
    def test_successors_and_new_episodes_as_gymnasium_goes_on_from_the_same_states(self, env_id: str) -> None:
        envs, singles = make(env_id), [gymnasium.make(env_id) for _ in SEEDS]
        envs.reset()
        for env in singles:
            env.reset()
        ends = 0
        for action in random_actions(envs.single_action_space, 450, len(SEEDS)):
            for i, env in enumerate(singles):
                env.unwrapped.state = envs.state_dict()["state"][:, i].numpy()
            step = envs.step(action)
            assert step.valid.all() and step.success is None
            state = envs.state_dict()["state"]
            for i, env in enumerate(singles):
                obs, reward, terminated, truncated, _ = env.step(native(env.action_space, action[i]))
                np.testing.assert_array_max_ulp(step.next_obs[i].numpy(), obs, maxulp=1)
                assert float(step.reward[i]) == pytest.approx(float(reward), abs=1e-8)
                assert (bool(step.terminated[i]), bool(step.truncated[i])) == (terminated, truncated)
                ended = terminated or truncated
                assert torch.equal(step.reset_obs[i], step.next_obs[i]) is not ended
                assert torch.equal(step.reset_obs[i], TASKS[env_id].observe(state[:, i : i + 1])[0])
                if ended:
                    ends += 1
                    env.reset()
        assert ends >= 2 * len(SEEDS)

    @pytest.mark.parametrize("env_id", TASKS)
    def test_first_states_are_spread_as_gymnasiums(self, env_id: str) -> None:
        """Ranges from 2000 of Gymnasium's own resets; uniform in them: quartiles within 5 standard errors."""
        env, n = gymnasium.make(env_id), 4000
        theirs = []
        for seed in range(2000):
            env.reset(seed=seed)
            theirs.append(np.array(env.unwrapped.state))
        bound = np.abs(theirs).max(0)  # within 0.2 % of the true bound, in all but e⁻⁴ of cases
        envs = make(env_id, list(range(n)))
        envs.reset()
        states = envs.state_dict()["state"].numpy() / bound[:, None]
        assert np.abs(states).max() < 1.01 and (np.abs(states).max(1) > 0.99).all()
        for q in (0.25, 0.5, 0.75):
            error = np.quantile(states, q, axis=1) - (2 * q - 1)
            assert np.abs(error).max() < 5 * 2 * math.sqrt(q * (1 - q) / n) + 0.01

    def test_no_episode_begins_as_another(self) -> None:
        """Episodes that begin at step n take number n of each environment's stream, whatever is drawn together."""
        envs, task, keys = make("Pendulum-v1"), TASKS["Pendulum-v1"], stream_keys(SEEDS, CPU)
        begun = [envs.reset() for _ in range(40)]
        for action in random_actions(envs.single_action_space, 400, len(SEEDS)):
            step = envs.step(action)
            begun += [step.reset_obs] if bool(step.truncated.all()) else []
        expected = [task.observe(task.begin(uniform(keys, n, 1, 2)[0])) for n in (*range(40), 40 + 199, 40 + 399)]
        assert torch.equal(torch.cat(begun), torch.cat(expected))
        assert len(torch.cat(begun).unique(dim=0)) == len(begun) * len(SEEDS)

    @pytest.mark.parametrize("env_id", TASKS)
    def test_numbers_do_not_depend_on_the_environments_beside(self, env_id: str) -> None:
        whole, parts = make(env_id), [make(env_id, SEEDS[:2]), make(env_id, SEEDS[2:])]
        assert torch.equal(whole.reset(), torch.cat([part.reset() for part in parts]))
        for action in random_actions(whole.single_action_space, 250, len(SEEDS)):
            step = whole.step(action)
            shares = [part.step(share) for part, share in zip(parts, action.split([2, 3]), strict=True)]
            for name in ("next_obs", "reset_obs", "reward", "terminated", "truncated"):
                assert torch.equal(getattr(step, name), torch.cat([getattr(share, name) for share in shares])), name


class TestActions:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_are_clipped_to_the_space(self, dtype: torch.dtype) -> None:
        wild, bounded = make("Pendulum-v1", [1, 2]), make("Pendulum-v1", [1, 2])
        wild.reset()
        bounded.reset()
        step = wild.step(torch.tensor([[-7.0], [1e30]], dtype=dtype))
        assert torch.equal(step.next_obs, bounded.step(torch.tensor([[-2.0], [2.0]])).next_obs)

    @pytest.mark.parametrize("shape", [(5,), (4, 1), (5, 2)])
    def test_wrong_shapes_are_refused(self, shape: tuple[int, ...]) -> None:
        envs = make("Pendulum-v1")
        envs.reset()
        with pytest.raises(EnvError, match=r"action has shape .*; the environments take \[5, 1\]"):
            envs.step(torch.zeros(shape))

    def test_no_step_before_the_first_reset(self) -> None:
        with pytest.raises(RuntimeError, match="before the first reset"):
            make("Pendulum-v1").step(torch.zeros(5, 1))


class TestSettings:
    @pytest.mark.parametrize("env_id", ["Hopper-v5", "pendulum"])
    def test_an_unknown_id_names_what_there_is(self, env_id: str) -> None:
        with pytest.raises(EnvError, match=r"env.id: .*only Pendulum-v1 and CartPole-v1.* env.backend to gymnasium"):
            make(env_id)

    def test_a_module_may_bring_a_task_of_its_own(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "slow_pole.py").write_text(
            "from dataclasses import replace\n"
            "from trpo.envs.torch_classic import TASKS\n"
            "TASKS['SlowPole-v0'] = replace(TASKS['CartPole-v1'], time_limit=3)\n"
        )
        (tmp_path / "broken_pole.py").write_text("1 / 0")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setitem(TASKS, "SlowPole-v0", None)  # taken back afterwards
        envs = make("slow_pole:SlowPole-v0")
        envs.reset()
        ended = [envs.step(torch.zeros(5, 1, dtype=torch.int64)).truncated.all().item() for _ in range(3)]
        assert ended == [False, False, True]
        with pytest.raises(EnvError, match=r"env.id: the module 'broken_pole' cannot be imported: ZeroDivisionError"):
            make("broken_pole:SlowPole-v0")

    def test_a_typo_names_what_was_meant(self) -> None:
        with pytest.raises(EnvError, match="did you mean CartPole-v1"):
            make("CartPool-v1")

    @pytest.mark.parametrize(
        "settings", [{"kwargs": {"g": 9.81}}, {"wrappers": (WrapperConfig(name="gymnasium.wrappers:TimeLimit"),)}]
    )
    def test_settings_of_gymnasiums_environments_are_refused(self, settings: dict[str, Any]) -> None:
        (key,) = settings
        with pytest.raises(EnvError, match=rf"env.{key}: backend torch takes none"):
            make_envs(config("Pendulum-v1", **settings), [0])

    def test_the_trainer_gives_its_device(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        given = []

        def recording(*args: Any, device: torch.device, **others: Any) -> Any:
            given.append(device)
            return make_envs(*args, device=device, **others)

        monkeypatch.setattr(trpo.trainer, "make_envs", recording)
        Trainer(run_config("CartPole-v1"), root=tmp_path, console=False).close()
        assert given == [CPU]


def policy_for(envs: Any, env_id: str, device: torch.device = CPU) -> Policy:
    spaces = envs.single_observation_space, envs.single_action_space
    return build_policy(config_for(env_id), *spaces, generator=seeded(), device=device)


class TestNoWaitingForTheDevice:
    """On a device without values, whatever reads one raises; so would wait for an accelerator what reads one there."""

    @pytest.mark.parametrize("env_id", TASKS)
    def test_in_the_environments(self, env_id: str) -> None:
        envs = make(env_id, device=META)
        assert envs.reset().device == META
        for action in random_actions(envs.single_action_space, 40, len(SEEDS)).to(META):
            step = envs.step(action)
        assert all(x.device == META for x in (step.next_obs, step.reset_obs, step.reward, step.truncated, step.valid))
        with pytest.raises(RuntimeError):
            step.truncated.any().item()

    @pytest.mark.parametrize("env_id", TASKS)
    def test_in_the_steps_of_a_rollout(self, env_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(trpo.collector, "_check_finite", lambda rollout: None)  # once a rollout, these two look
        monkeypatch.setattr(Collector, "_episodes", lambda self, rollout: None)
        envs = make(env_id, device=META)
        policy = policy_for(envs, env_id, META)
        generator: Any = None  # no generator draws on this device
        rollout, _ = Collector(envs, policy, 20, generator=generator).collect()
        assert rollout.next_obs.device == META


class TestNotFinite:
    """Looked for once a rollout, before anything learns from it."""

    def test_an_action_is_named(self) -> None:
        envs = make("Pendulum-v1")
        policy = policy_for(envs, "Pendulum-v1")
        policy.theta.assign_(policy.theta.vector * math.nan)
        collector = Collector(envs, policy, 4, generator=seeded())
        with pytest.raises(EnvError, match="environment 0, step 0 of the rollout: the action is not finite"):
            collector.collect()

    @pytest.mark.parametrize(
        ("what", "value", "problem"),
        [
            ("reward", math.nan, "reward is not finite"),
            ("reward", -1e160, r"reward is beyond 1e\+100"),
            ("next_obs", math.inf, "observation is not finite"),
        ],
    )
    def test_what_an_environment_gives_is_named(
        self, what: str, value: float, problem: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        envs = make("Pendulum-v1")
        collector = Collector(envs, policy_for(envs, "Pendulum-v1"), 4, generator=seeded())
        honest, steps = envs.step, []

        def faulty(action: torch.Tensor) -> Step:
            step = honest(action)
            steps.append(step)
            if len(steps) == 3:
                getattr(step, what)[2] = value
            return step

        monkeypatch.setattr(envs, "step", faulty)
        with pytest.raises(EnvError, match=f"environment 2, step 2 of the rollout: the {problem}"):
            collector.collect()


class TestExactResume:
    @pytest.mark.parametrize("env_id", TASKS)
    @pytest.mark.parametrize("steps", [0, 7, 230])
    def test_goes_on_to_the_bit_from_a_checkpoint(self, env_id: str, steps: int, tmp_path: Path) -> None:
        envs = make(env_id)
        assert envs.exact_resume
        last = envs.reset()
        before, after = random_actions(envs.single_action_space, steps + 450, len(SEEDS)).split([steps, 450])
        for action in before:
            last = envs.step(action).reset_obs
        save_state(tmp_path / "state", envs.state_dict())
        restored = make(env_id, [1, 2, 3, 4, 5])
        for _ in range(3):
            restored.reset()
        assert torch.equal(restored.load_state_dict(load_state(tmp_path / "state")), last)
        for action in after:
            a, b = envs.step(action), restored.step(action)
            for name in ("next_obs", "reset_obs", "reward", "terminated", "truncated"):
                assert torch.equal(getattr(a, name), getattr(b, name)), name

    def test_a_state_is_no_view_of_the_running_environments(self) -> None:
        envs = make("CartPole-v1")
        envs.reset()
        state = envs.state_dict()
        before = {name: torch.as_tensor(value).clone() for name, value in state.items()}
        for action in random_actions(envs.single_action_space, 30, len(SEEDS)):
            envs.step(action)
        assert all(torch.equal(torch.as_tensor(state[name]), before[name]) for name in before)

    def test_states_that_do_not_fit_are_refused(self) -> None:
        envs = make("CartPole-v1")
        with pytest.raises(RuntimeError, match="before the first reset"):
            envs.state_dict()
        envs.reset()
        with pytest.raises(EnvError, match="the state holds 5 environments, this run has 2"):
            make("CartPole-v1", [0, 1]).load_state_dict(envs.state_dict())
        with pytest.raises(EnvError, match="of another task"):
            make("Pendulum-v1").load_state_dict(envs.state_dict())

    @pytest.mark.parametrize("env_id", TASKS)
    def test_a_run_stopped_and_resumed_is_the_undisturbed_run(self, env_id: str, tmp_path: Path) -> None:
        undisturbed = train(run_config(env_id), tmp_path / "a").directory
        run = train(run_config(env_id), tmp_path / "b", max_updates=2).directory
        resume(run)
        assert_same_run(undisturbed, run)


def run_config(env_id: str) -> Config:
    """Four updates, with episodes that span them, ending with an evaluation in Gymnasium's environment."""
    return config_for(
        env_id,
        env={"id": env_id, "num_envs": 3, "backend": "torch"},
        total_steps=4 * 270,
        batch_size=270,
        device="cpu",
        evaluation={"every_steps": 0, "final_episodes": 1},
    )
