"""Choices that a state rules out are never taken, and the others are as if those were not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from commands import config_for, one_line, run_script
from gymnasium import spaces
from helpers import F64, make_mlp, randn, seeded
from test_resume import assert_same_run, resume, train
from torch import Tensor
from torch import distributions as td

from trpo import Trainer, load_policy
from trpo.config import Config
from trpo.distributions import Categorical
from trpo.envs.wrappers import MaskFromInfo
from trpo.errors import CheckpointError, ConfigError, EnvError
from trpo.export import export_onnx
from trpo.networks.action_mask import ActionMask
from trpo.normalizer import ObservationNormalizer
from trpo.policy import Policy, build_policy
from trpo.run.checkpoint import load_state, save_state

SIZES = [3, 2]
MASK = torch.tensor([[1, 0, 1, 1, 1], [1, 1, 1, 0, 1], [0, 0, 1, 1, 0], [0, 0, 0, 1, 1], [1, 1, 1, 1, 1]], dtype=F64)
ALL_OF_NONE = MASK.clone()
ALL_OF_NONE[3, :3] = 1  # nothing is left of the first component there: all of it is


class Lights(gymnasium.Env[Any, Any]):
    """Some of four lamps are lit; switching one on that is not raises, the brightest of the lit ones gives 1."""

    observation_space = spaces.Dict(brightness=spaces.Box(0, 1, (4,), np.float32), lit=spaces.MultiBinary(4))
    action_space = spaces.Discrete(4, start=1)

    def _observe(self) -> dict[str, Any]:
        self._brightness = self.np_random.random(4, np.float32)
        self._lit = np.zeros(4, np.int8)
        self._lit[self.np_random.permutation(4)[: self.np_random.integers(1, 4)]] = 1
        return {"brightness": self._brightness, "lit": self._lit}

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self._steps = 0
        return self._observe(), {}

    def step(self, action: Any) -> Any:
        chosen = int(action) - 1
        assert self._lit[chosen], "that lamp is not lit"
        reward = float(self._brightness[chosen] == self._brightness[self._lit == 1].max())
        self._steps += 1
        return self._observe(), reward, False, self._steps == 20, {}


gymnasium.register("Lights-v0", Lights)


def lights(total_steps: int = 1536, **changes: Any) -> Config:
    given = {
        "env": {"id": "test_action_mask:Lights-v0", "num_envs": 4},
        "total_steps": total_steps,
        "batch_size": 256,
        "policy": {"hidden_sizes": (16, 16), "action_mask": "lit", "noise_exponent": 1.0},
        "checkpoint": {"every_steps": 512},
    }
    return Config.model_validate(given | changes)


def masked_policy(columns: slice = slice(1, 6)) -> Policy:
    """Of float64 observations [8], five of which are the mask."""
    network = ActionMask(make_mlp([8, 6, 5]), columns, SIZES)
    return Policy(network, Categorical(SIZES), ObservationNormalizer(8, clip=10.0, dtype=F64, plain=columns))


def observations(mask: Tensor, *, repeat: int = 1) -> Tensor:
    rows = mask.repeat_interleave(repeat, 0)
    return torch.cat([randn(len(rows), 1, seed=3), rows, randn(len(rows), 2, seed=4)], -1)


def over_what_is_left(logits: Tensor, mask: Tensor) -> list[list[td.Categorical]]:
    """torch's distributions of each row's components, made of the logits of its allowed choices alone."""
    rows = zip(logits, mask.bool(), strict=True)
    return [
        [td.Categorical(logits=part[left]) for part, left in zip(row.split(SIZES), allowed.split(SIZES), strict=True)]
        for row, allowed in rows
    ]


def test_it_is_the_distribution_over_what_is_left() -> None:
    policy, obs, other = masked_policy(), observations(MASK), masked_policy()
    other.theta.assign_(policy.theta.vector + 0.3 * randn(len(policy.theta.vector), seed=9))
    eta, new = policy(obs).detach(), other(obs).detach()
    old_rows, new_rows = (over_what_is_left(p.network.network(obs).detach(), ALL_OF_NONE) for p in (policy, other))
    # What is ruled out lies 1e8 below, so that e^-1e8 is 0; the rest are the same sums in another order, to rounding.
    tolerance = {"rtol": 1e-10, "atol": 1e-14}
    entropy = torch.stack([sum(part.entropy() for part in row) for row in old_rows])
    torch.testing.assert_close(policy.distribution.entropy(eta), entropy, **tolerance)
    pairs = zip(old_rows, new_rows, strict=True)
    kl = torch.stack([sum(map(td.kl_divergence, *pair)) for pair in pairs])
    torch.testing.assert_close(policy.distribution.kl(eta, new), kl, **tolerance)
    taken = torch.tensor([[2, 1], [0, 1], [2, 0], [1, 1], [0, 0]])
    places = torch.tensor([[1, 1], [0, 0], [0, 0], [1, 1], [0, 0]])  # of these choices among what is left
    log_prob = [
        sum(p.log_prob(k) for p, k in zip(row, where, strict=True)) for row, where in zip(old_rows, places, strict=True)
    ]
    torch.testing.assert_close(policy.distribution.log_prob(eta, taken), torch.stack(log_prob), **tolerance)


def test_what_is_ruled_out_is_never_taken() -> None:
    policy, obs = masked_policy(), observations(MASK, repeat=2000)
    with torch.no_grad():  # the network would like nothing better than the ruled out
        policy.network.network.head.bias.copy_(torch.tensor([-40.0, 40.0, -40.0, 0.0, 40.0]))
    noise = policy.distribution.noise(len(obs), like=obs, generator=seeded())
    taken = torch.empty(1, len(obs), 2)
    policy.actor(obs[None], noise[None], taken)(0)
    allowed = ALL_OF_NONE.bool().repeat_interleave(2000, 0)
    for action in (policy.sample(obs, noise), policy.mode(obs), taken[0].long()):
        assert allowed[:, :3].gather(1, action[:, :1]).all() and allowed[:, 3:].gather(1, action[:, 1:]).all()


def test_choices_are_drawn_as_often_as_they_are_likely() -> None:
    policy = masked_policy()
    obs = observations(MASK)[:1].expand(40_000, -1)
    action = policy.sample(obs, policy.distribution.noise(len(obs), like=obs, generator=seeded()))
    likely = policy(obs[:1]).detach()[0, :3].softmax(-1)
    assert likely[1] == 0
    # Four standard deviations of a share of 40,000 draws are at most 4 · 0.5 / 200.
    torch.testing.assert_close(action[:, 0].bincount(minlength=3) / 40_000, likely.float(), rtol=0, atol=0.01)


@pytest.mark.parametrize("clip", [10.0, 0.5])
def test_a_mask_is_not_normalised(clip: float) -> None:
    normalizer = ObservationNormalizer(8, clip=clip, dtype=F64, plain=slice(1, 6))
    obs = observations(MASK)
    normalizer.update(obs)
    for after in (normalizer, ObservationNormalizer(8, clip=clip, dtype=F64, plain=slice(1, 6))):
        after.load_state_dict(normalizer.state_dict())
        normalized = after(obs)
        assert torch.equal(normalized[:, 1:6], MASK.clamp(max=clip))
        rest = [0, 6, 7]
        expected = (obs - obs.mean(0)) / obs.std(0, correction=0)
        # The normaliser adds 1e-8 to variances of about one.
        torch.testing.assert_close(normalized[:, rest], expected[:, rest].clamp(-clip, clip), rtol=1e-7, atol=1e-8)


def test_the_mask_is_found_where_the_flat_observation_has_it() -> None:
    space = spaces.Dict(
        {"first": spaces.Discrete(3), "mask": spaces.Box(0, 1, (5,)), "then": spaces.Box(-1, 1, (2, 2))}
    )
    config = config_for(policy={"hidden_sizes": (8,), "action_mask": "mask"})
    policy = build_policy(config, space, spaces.MultiDiscrete(SIZES), generator=seeded(), device=torch.device("cpu"))
    sample = space.sample() | {"mask": np.array([0, 0, 1, 1, 0], np.float32)}
    flat = torch.from_numpy(spaces.flatten(space, sample))[None]
    assert policy.obs_dim == 12 and policy.mode(flat).tolist() == [[2, 0]]


@pytest.mark.parametrize(
    ("observation", "action", "problem"),
    [
        (spaces.Box(-1, 1, (4,)), spaces.Discrete(4), "no Dict that has 'lit'"),
        (spaces.Dict(light=spaces.MultiBinary(4)), spaces.Discrete(4), "no Dict that has 'lit'"),
        (spaces.Dict(lit=spaces.MultiBinary(3)), spaces.Discrete(4), "'lit' of an observation has 3 numbers.*4 choic"),
        (spaces.Dict(lit=spaces.MultiBinary(4)), spaces.MultiDiscrete([2, 3]), "has 4 numbers.*5 choices"),
        (spaces.Dict(lit=spaces.MultiBinary(2)), spaces.Box(-1, 1, (2,)), "actions are Box.*only choices"),
        (spaces.Dict(lit=spaces.MultiBinary(2)), spaces.MultiBinary(2), "actions are MultiBinary.*only choices"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(observation: Any, action: Any, problem: str) -> None:
    config = config_for(policy={"action_mask": "lit"})
    with pytest.raises(ConfigError, match=rf"policy\.action_mask: .*{problem}"):
        build_policy(config, observation, action, generator=seeded(), device=torch.device("cpu"))


def test_a_run_never_takes_it_goes_on_to_the_bit_and_leaves_a_policy_that_neither_does(tmp_path: Path) -> None:
    """The environment raises where it does."""
    undisturbed = train(lights(), tmp_path / "a").directory
    run = train(lights(), tmp_path / "b", max_updates=3).directory
    resume(run)
    assert_same_run(undisturbed, run)

    saved = load_policy(run)
    env = gymnasium.make("Lights-v0")
    observation, _ = env.reset(seed=5)
    for deterministic in (True, False) * 50:
        observation, *_ = env.step(saved.act(observation, deterministic=deterministic))


def test_it_learns_what_there_is_to_choose(tmp_path: Path) -> None:
    """Always the brightest lamp of one, two or three that are lit is 20; one of them at random 20 · 11/18."""
    result = train(lights(16_384), tmp_path)
    assert result.evaluation is not None and np.mean(result.evaluation.returns) > 17


def test_an_exported_policy_does_not_take_it(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    run = train(lights(512), tmp_path)
    saved = load_policy(run.directory)
    export_onnx(saved, tmp_path / "lights.onnx")
    obs = np.concatenate([np.random.default_rng(0).random((64, 4)), np.eye(4).repeat(16, 0)], 1).astype(np.float32)
    (action,) = onnxruntime.InferenceSession(tmp_path / "lights.onnx").run(None, {"observation": obs})
    assert action.tolist() == (np.arange(64) // 16 + 1).tolist()  # the one that is left of each, counted from 1


def test_a_saved_policy_whose_observations_have_no_such_mask_is_damaged(tmp_path: Path) -> None:
    run = train(lights(512), tmp_path)
    state = load_state(run.directory / "final")
    state["config"]["policy"]["action_mask"] = "dark"
    save_state(tmp_path / "damaged", state, replace=False)
    with pytest.raises(CheckpointError, match=r"damaged is not a policy .*no Dict that has 'dark'"):
        load_policy(tmp_path / "damaged")


def test_a_run_does_not_start_from_a_policy_with_another_mask(tmp_path: Path) -> None:
    run = train(lights(512), tmp_path)
    with pytest.raises(CheckpointError, match=r"policy\.action_mask"):
        Trainer(lights(512, policy={"hidden_sizes": (16, 16)}), root=tmp_path, start_from=run.directory, console=False)


def test_masks_in_info_become_observations() -> None:
    plain, wrapped = gymnasium.make("Taxi-v4"), MaskFromInfo(gymnasium.make("Taxi-v4"))
    (expected, info), (observation, _) = plain.reset(seed=3), wrapped.reset(seed=3)
    for action in (0, 1, 4, 3, 2, 5):
        assert wrapped.observation_space.contains(observation)
        assert observation["observation"] == expected
        assert np.array_equal(observation["action_mask"], info["action_mask"])
        expected, *_, info = plain.step(action)
        observation, *_ = wrapped.step(action)


class InTwoParts(gymnasium.Env[Any, Any]):
    observation_space, action_space = spaces.Box(0, 1, (1,)), spaces.MultiDiscrete([2, 3])

    def reset(self, **options: Any) -> Any:
        return np.zeros(1, np.float32), {"legal": (np.int8([0, 1]), np.int8([1, 0, 1]))}


def test_a_mask_in_parts_is_joined_and_one_that_is_missing_named() -> None:
    observation, _ = MaskFromInfo(InTwoParts(), key="legal").reset()
    assert observation["legal"].tolist() == [0, 1, 1, 0, 1]
    with pytest.raises(EnvError, match=r"info has no 'action_mask', only \['legal'\]"):
        MaskFromInfo(InTwoParts()).reset()
    with pytest.raises(EnvError, match="only choices"):
        MaskFromInfo(gymnasium.make("Pendulum-v1"))


def test_a_mistake_is_one_line_and_status_2(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    arguments = ("--env", "CartPole-v1", "--set", "policy.action_mask=legal", "--root", tmp_path / "runs")
    outcome = run_script("train.py", *arguments, capture=capsys, patch=monkeypatch)
    assert outcome.status == 2 and "no Dict that has 'legal'" in one_line(outcome.err)
    assert not (tmp_path / "runs").exists()
