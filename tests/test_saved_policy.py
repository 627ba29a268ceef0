"""Saved policies: everything comes back, actions are what the formulas say, and nothing on disk is trusted."""

from __future__ import annotations

import contextlib
import copy
import enum
import inspect
import os
import sys
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from commands import PROJECT, config_for, random_policy, saved_policy
from gymnasium import spaces
from gymnasium.spaces import flatdim
from helpers import seeded
from hypothesis import given
from hypothesis import strategies as st

from trpo.distributions import distribution_for
from trpo.errors import CheckpointError, EnvError
from trpo.evaluation import evaluate
from trpo.run.checkpoint import load_state, save_state
from trpo.run.saved_policy import SavedPolicy, load_policy, save_policy
from trpo.run.trust import UntrustedCodeError

OBS_DIM = 5
SPACES: dict[str, spaces.Space[Any]] = {
    "box": spaces.Box(np.float32([[-0.5, -np.inf], [-0.2, 0.1]]), np.float32([[0.5, 0.3], [np.inf, 0.4]])),
    "box_float64": spaces.Box(np.array([0.1, -1.0]), np.array([0.3, 1.0]), dtype=np.float64),
    "discrete": spaces.Discrete(4, start=-2),
    "multi_discrete": spaces.MultiDiscrete([[2, 3], [4, 5]], start=[[1, 0], [-3, 7]]),
    "multi_binary": spaces.MultiBinary([2, 3]),
    "multi_binary_flat": spaces.MultiBinary(4),
}
if "dtype" in inspect.signature(spaces.Discrete).parameters:  # not yet in the oldest Gymnasium
    SPACES["discrete_int32"] = spaces.Discrete(3, dtype=np.int32)


def saved(path: Path, space: str, **changes: Any) -> SavedPolicy:
    changes = {"policy": {"hidden_sizes": (8, 8), "bins": 11}} | changes  # ordinal where bounded
    return saved_policy(path / "policy", config_for(dtype="float64", **changes), OBS_DIM, SPACES[space])


def observations(rows: int = 30) -> np.ndarray:
    """Some far enough out to reach the normaliser's clip at 10 standard deviations."""
    return np.random.default_rng(0).normal(0.5, 12.0, (rows, OBS_DIM))


def by_hand(policy: SavedPolicy, obs: np.ndarray) -> np.ndarray:
    """Distribution parameters [N, K] from the stored numbers alone, in numpy."""
    state = {key: value.numpy() for key, value in load_state(policy.path)["policy"].items()}
    variance = state["normalizer.moments.m2"] / state["normalizer.moments.count"]
    h = np.clip((obs - state["normalizer.moments.mean"]) / np.sqrt(variance + 1e-8), -10, 10)
    layers = sorted({key.rsplit(".", 1)[0] for key in state if ".layers." in key})
    for layer in layers:
        h = h @ state[f"{layer}.weight"].T + state[f"{layer}.bias"]
        h = h if layer == layers[-1] else np.tanh(h)
    return h


def native_by_hand(eta: np.ndarray, space: spaces.Space[Any]) -> np.ndarray:
    """Parameters [N, K] → the actions without noise as the environment takes them."""
    n = len(eta)
    if isinstance(space, spaces.Box) and space.is_bounded("both"):
        eta = eta.reshape(n, *space.shape, -1)
        eta[..., 1:] += eta[..., :1]  # the tilt
        logits = np.cumsum(eta, -1) - eta[..., :1]
        p = np.exp(logits - logits.max(-1, keepdims=True))
        values = np.linspace(space.low, space.high, p.shape[-1], axis=-1)
        return ((p * values).sum(-1) / p.sum(-1)).clip(space.low, space.high).astype(space.dtype)
    if isinstance(space, spaces.Box):
        return np.clip(eta.reshape(n, *space.shape), space.low, space.high).astype(space.dtype)
    if isinstance(space, spaces.Discrete):
        return eta.argmax(-1) + space.start
    if isinstance(space, spaces.MultiDiscrete):
        ends = np.cumsum(space.nvec.ravel())[:-1]
        best = np.stack([part.argmax(-1) for part in np.split(eta, ends, -1)], -1)
        return best.reshape(n, *space.shape) + space.start
    return (eta > 0).astype(np.int8).reshape(n, *space.shape)


@pytest.mark.parametrize("space", SPACES)
def test_round_trip_gives_back_policy_settings_space_and_figures(space, tmp_path):
    config = config_for("Hopper-v5", seed=4)
    policy = random_policy(config, OBS_DIM, SPACES[space])
    save_policy(tmp_path / "p", policy, config, SPACES[space], {"env_steps": 12, "evaluation": {"eval/mean": 1.5}})
    loaded = load_policy(tmp_path / "p")
    assert loaded.action_space == SPACES[space] and loaded.action_space.dtype == SPACES[space].dtype
    assert loaded.config == config
    assert loaded.info == {"env_steps": 12, "evaluation": {"eval/mean": 1.5}}
    assert loaded.obs_dim == OBS_DIM
    stored, original = loaded.policy.state_dict(), policy.state_dict()
    assert stored.keys() == original.keys()
    assert all(torch.equal(stored[key], original[key]) for key in original)


@pytest.mark.parametrize("space", SPACES)
def test_act_is_the_mode_as_the_environment_takes_it(space, tmp_path):
    policy = saved(tmp_path, space)
    obs = observations()
    expected = native_by_hand(by_hand(policy, obs), SPACES[space])
    action = policy.act(obs)
    assert action.shape == (len(obs), *SPACES[space].shape) and action.dtype == SPACES[space].dtype
    # float64 throughout, a few hundred operations of order one: rounding stays below 1e-12; float32 bounds add 1e-7.
    np.testing.assert_allclose(action, expected, rtol=0, atol=1e-6 if action.dtype == np.float32 else 1e-12)
    assert all(SPACES[space].contains(row) for row in action)
    assert len(np.unique(action.reshape(len(obs), -1), axis=0)) > 1  # the comparison is not one of constants


@pytest.mark.parametrize("space", SPACES)
def test_one_observation_gives_one_action_that_the_space_contains(space, tmp_path):
    policy = saved(tmp_path, space)
    obs = observations()[0]
    action = policy.act(obs)
    assert SPACES[space].contains(action)
    np.testing.assert_allclose(action, policy.act(obs[None])[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("space", SPACES)
def test_samples_repeat_with_the_generator_and_vary_without(space, tmp_path):
    policy = saved(tmp_path, space)
    obs = np.repeat(observations(1), 200, 0)
    first, again, other = (policy.act(obs, deterministic=False, generator=seeded(s)) for s in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert all(SPACES[space].contains(row) for row in first)


def test_samples_of_a_box_are_mean_plus_std_times_noise_clipped(tmp_path):
    bounds = 0.01, 2.0
    policy = saved(
        tmp_path,
        "box",
        policy={"hidden_sizes": [8, 8], "bins": None, "std": dict(zip(("min", "max"), bounds, strict=True))},
    )
    obs = observations()
    raw = load_state(policy.path)["policy"]["network.raw_log_std"].numpy()
    low, high = np.log(bounds)
    std = np.exp(low + (high - low) / (1 + np.exp(-4 * (raw - (low + high) / 2) / (high - low))))
    noise = torch.randn(len(obs), 4, generator=seeded(3), dtype=torch.float64).numpy()
    expected = native_by_hand(by_hand(policy, obs) + std * noise, SPACES["box"])
    action = policy.act(obs, deterministic=False, generator=seeded(3))
    np.testing.assert_allclose(action, expected, rtol=0, atol=1e-6)  # the space is float32


def test_without_normalisation_observations_go_in_as_they_are(tmp_path):
    policy = saved(tmp_path, "box_float64", normalize={"observations": False}, policy={"bins": None})
    obs = observations() / 10
    state = load_state(policy.path)["policy"]
    assert state["normalizer.moments.count"] == 0
    h = obs
    for i in range(3):
        weight, bias = (state[f"network.network.layers.{i}.{kind}"].numpy() for kind in ("weight", "bias"))
        h = (np.tanh(h) if i else h) @ weight.T + bias
    np.testing.assert_allclose(policy.act(obs), np.clip(h, [0.1, -1], [0.3, 1]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(OBS_DIM + 1,), (1, 1, OBS_DIM), (), (OBS_DIM, 1)])
def test_act_names_the_shape_it_wants(shape, tmp_path):
    with pytest.raises(ValueError, match=r"expected \[5\] or \[N, 5\]"):
        saved(tmp_path, "box").act(np.zeros(shape))


def test_act_says_how_to_flatten_a_dict(tmp_path):
    with pytest.raises(ValueError, match="FlattenObservation"):
        saved(tmp_path, "box").act({"position": np.zeros(OBS_DIM)})


UNFLAT: dict[str, spaces.Space[Any]] = {
    "dict": spaces.Dict(  # whose order is its own, not the alphabet's
        OrderedDict(
            speed=spaces.Box(-np.inf, np.inf, (2,), np.float64),
            at=spaces.Tuple([spaces.Discrete(3, start=-1), spaces.MultiBinary(2)]),
            grid=spaces.Box(0, 255, (2, 2), np.uint8),
        )
    ),
    "tuple": spaces.Tuple([spaces.Box(-1, 1, (3,)), spaces.MultiDiscrete([2, 3])]),
    "discrete": spaces.Discrete(4),
    "row": spaces.Box(-1, 1, (1, 3)),
    "picture": spaces.Box(0, 255, (3, 2, 1), np.uint8),
}


@pytest.mark.parametrize("observes", UNFLAT)
def test_act_takes_what_the_environment_gives(observes, tmp_path):
    space, config = UNFLAT[observes], config_for()
    rows = flatdim(space)
    policy = random_policy(config, rows, SPACES["box"])
    save_policy(tmp_path / "p", policy, config, SPACES["box"], {}, observation_space=space)
    loaded = load_policy(tmp_path / "p")
    assert loaded.observation_space == space
    space.seed(0)
    for _ in range(5):
        obs = space.sample()
        flat = np.asarray(gymnasium.spaces.flatten(space, obs))
        assert flat.shape == (rows,) and np.array_equal(loaded.act(obs), loaded.act(flat))
        assert loaded.act(obs).shape == SPACES["box"].shape  # no batch of one
    if observes == "dict":
        with pytest.raises(ValueError, match=r"expected \[11\] .*keys \['at', 'speed'\].*says a dict with the keys"):
            loaded.act({key: part for key, part in obs.items() if key != "grid"})
    else:
        with pytest.raises(ValueError, match="FlattenObservation"):
            loaded.act({"position": flat})


def test_parts_named_by_what_is_no_text_are_not_written_down(tmp_path):
    class Part(enum.StrEnum):
        ARM = "arm"

    space = spaces.Dict({Part.ARM: spaces.Box(-1, 1, (OBS_DIM,))})
    policy = random_policy(config_for(), OBS_DIM, SPACES["box"])
    save_policy(tmp_path / "p", policy, config_for(), SPACES["box"], {}, observation_space=space)
    assert load_policy(tmp_path / "p").observation_space is None


def test_an_observation_space_of_another_size_is_a_checkpoint_error(tmp_path):
    policy = random_policy(config_for(), OBS_DIM, SPACES["box"])
    save_policy(tmp_path / "p", policy, config_for(), SPACES["box"], {}, observation_space=spaces.Discrete(4))
    with pytest.raises(CheckpointError, match=r"its observations are 5 numbers, those of Discrete\(4\) are not"):
        load_policy(tmp_path / "p")


@pytest.mark.parametrize("space", ["box", "discrete"])
def test_an_observation_that_is_not_finite_is_no_action(space, tmp_path):
    with pytest.raises(EnvError, match="not finite"):
        saved(tmp_path, space).act(np.full(OBS_DIM, np.nan))


def test_a_run_opens_its_final_policy_else_its_best(tmp_path):
    best = saved_policy(tmp_path / "run" / "best", config_for(), OBS_DIM, SPACES["box"], seed=1)
    assert load_policy(tmp_path / "run").path == best.path
    final = saved_policy(tmp_path / "run" / "final", config_for(), OBS_DIM, SPACES["box"], seed=2)
    assert load_policy(str(tmp_path / "run")).path == final.path
    assert load_policy(best.path).path == best.path


def test_what_is_no_policy_is_said_in_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    for run in ("run", "crashed"):
        (tmp_path / run).mkdir()
        (tmp_path / run / "config.yaml").touch()
    (tmp_path / "pretrained" / "Pusher-v5").mkdir(parents=True)
    save_state(tmp_path / "run" / "checkpoints" / "step-000000001", {})
    save_state(tmp_path / "checkpoint", {"policy": {}, "value": {}})
    for name, problem in {
        "missing": "no such file",
        "crash": "no such file.*did you mean .*crashed",
        "pretrained/Zebra": "no such file[^?]*$",
        ".": "holds no policy[^?]*$",
        "empty": "holds no policy",
        "run": "step-000000001 is not a policy .*it holds something else; give a run",
        "crashed": "neither a policy nor a checkpoint; wait for the first if it is being trained, else start a new one",
        "run/config.yaml": "is a file",
        "checkpoint": "it holds something else; give a run, its final/ or a checkpoint",
    }.items():
        with pytest.raises(CheckpointError, match=problem):
            load_policy(tmp_path / name)
    for time, name in enumerate(("run/best", "crashed/final")):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (time, time))
    with pytest.raises(CheckpointError, match=r"holds no policy.*did you mean .*crashed\?$"):
        load_policy(tmp_path)


@pytest.mark.parametrize("damage", ["truncate", "flip", "no tensors", "pickle"])
def test_a_damaged_policy_is_a_checkpoint_error(damage, tmp_path):
    path = saved(tmp_path, "box").path
    file = path / "tensors.safetensors"
    data = bytearray(file.read_bytes())
    if damage == "no tensors":
        file.unlink()
    else:
        data[-9] ^= 1
        file.write_bytes({"truncate": data[:-1], "flip": data, "pickle": b"cos\nsystem\n(S'true'\ntR."}[damage])
    with pytest.raises(CheckpointError, match="cannot load"):
        load_policy(path)


# A valid checksum says that a file is whole, not that it is honest: these are written by the same code as honest ones.
HOSTILE: dict[str, tuple[tuple[str, ...], Any]] = {
    "unknown space": (("action_space", "type"), "os.system"),
    "no choices": (("action_space", "n"), -1),
    "endless choices": (("action_space", "n"), 10**12),
    "no dtype": (("action_space", "dtype"), "object"),
    "endless observations": (("obs_dim",), 10**12),
    "observations in text": (("obs_dim",), "5"),
    "endless layers": (("config", "policy", "hidden_sizes"), [10**6, 10**6]),
    "other layers": (("config", "policy", "hidden_sizes"), [4, 8]),
    "unknown setting": (("config", "call"), "os.system"),
    "setting of another type": (("config", "policy", "mean_head_scale"), "big"),
    "config missing": (("config",), None),
    "weights that are text": (("policy", "network.layers.0.bias"), "0"),
    "weights not finite": (("policy", "network.layers.0.bias"), torch.full((8,), torch.nan)),
    "variance negative": (("policy", "normalizer.moments.m2"), torch.full((OBS_DIM,), -1e9, dtype=torch.float64)),
    "no weights": (("policy",), {}),
    "figures that are none": (("info",), ["env_steps"]),
}


def altered(state: Any, keys: tuple[str, ...], value: Any) -> Any:
    """A copy of a tree of dicts with one value replaced."""
    out = copy.deepcopy(state)
    node = out
    for key in keys[:-1]:
        node = node[key]
    node[keys[-1]] = value
    return out


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_values_are_a_checkpoint_error(kind, tmp_path):
    state = load_state(saved_policy(tmp_path / "p", config_for(), OBS_DIM, SPACES["discrete"]).path)
    save_state(tmp_path / "hostile", altered(state, *HOSTILE[kind]))
    with pytest.raises(CheckpointError, match="not a policy this version can open"):
        load_policy(tmp_path / "hostile")


def test_layers_that_are_not_stored_take_no_memory(tmp_path, monkeypatch):
    state = load_state(saved_policy(tmp_path / "p", config_for(), OBS_DIM, SPACES["box_float64"]).path)
    save_state(tmp_path / "hostile", altered(state, ("config", "policy", "bins"), 10**5))
    built = []

    def counted(space, bins, **options):
        built.append(bins)
        return distribution_for(space, bins=bins, **options)

    monkeypatch.setattr("trpo.run.saved_policy.distribution_for", counted)
    with pytest.raises(CheckpointError, match="its settings describe"):
        load_policy(tmp_path / "hostile")
    assert built == [2]  # and not 10⁵ x 10⁵ numbers


def _places(tree: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The paths to all values of a tree of dicts, inner ones too."""
    children = tree.items() if isinstance(tree, dict) else ()
    return [path] + [place for key, value in children for place in _places(value, (*path, key))]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(data=st.data())
def test_any_value_anywhere_opens_or_is_a_checkpoint_error(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz")
    state = load_state(saved_policy(path / "p", config_for(), OBS_DIM, SPACES["multi_discrete"]).path)
    places = _places(state)[1:]
    save_state(path / "p", altered(state, data.draw(st.sampled_from(places)), data.draw(JSON)), replace=True)
    with contextlib.suppress(CheckpointError):
        load_policy(path / "p")


NAMES_CODE = {
    "id": {"id": "marker_module:Env-v0"},
    "wrapper": {"id": "CartPole-v1", "wrappers": [{"name": "marker_module:Wrapper"}]},
    "wrapper beside ours": {
        "id": "CartPole-v1",
        "wrappers": [{"name": "trpo.envs.wrappers:MaskFromInfo"}, {"name": "marker_module:Wrapper"}],
    },
    "kwargs": {"id": "CartPole-v1", "kwargs": {"inner": [{"env_id": "marker_module:Env-v0"}]}},
}


@pytest.mark.parametrize("where", NAMES_CODE)
def test_settings_that_name_code_are_refused_and_not_imported(where, tmp_path, monkeypatch):
    (tmp_path / "marker_module.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    policy = saved(tmp_path, "discrete", env=NAMES_CODE[where])
    with pytest.raises(CheckpointError, match=r"marker_module.*--trust-code"):
        policy.environment()
    assert "marker_module" not in sys.modules
    assert policy.environment(trust_code=True) == policy.config.env


@pytest.mark.parametrize(
    "env",
    [
        {"id": "Hopper-v5", "kwargs": {"healthy_z_range": [0.5, 2.0], "xml_file": "hopper.xml"}},
        {"id": "Taxi-v4", "wrappers": [{"name": "trpo.envs.wrappers:MaskFromInfo", "kwargs": {"key": "a:b"}}]},
    ],
)
def test_settings_that_name_no_code_are_given(env, tmp_path):
    policy = saved(tmp_path, "box", env=env)
    assert policy.environment() == policy.config.env


GAUSSIAN = {"hidden_sizes": (8, 8), "bins": None}


@pytest.mark.parametrize("space", SPACES)
def test_a_policy_to_start_from_acts_as_it_did(space, tmp_path):
    origin = saved(tmp_path, space)
    # What shapes no function of the parameters may be another.
    config = config_for(
        dtype="float64", policy={"hidden_sizes": (8, 8), "std": {"initial": 0.7}, "noise_exponent": 0.0}
    )
    policy = random_policy(config, OBS_DIM, SPACES[space], seed=9)
    origin.copy_to(policy, config, SPACES[space])
    obs = torch.from_numpy(observations())
    assert torch.equal(policy(policy.normalizer(obs)), origin.policy(origin.policy.normalizer(obs)))


@pytest.mark.parametrize(
    ("saved_with", "given", "problem"),
    [
        ({}, {"policy": {"hidden_sizes": (8, 9)}}, r"policy.hidden_sizes: \[8, 8\] → \[8, 9\]"),
        ({}, {"policy": {"hidden_sizes": (8, 8), "activation": "relu"}}, 'policy.activation: "tanh" → "relu"'),
        ({}, {"policy": {"hidden_sizes": (8, 8), "bins": 7}}, "policy.bins: 11 → 7"),
        ({}, {"normalize": {"observations": False}}, "normalize.observations: true → false"),
        ({"policy": GAUSSIAN}, {"policy": {**GAUSSIAN, "std": {"min": 0.2}}}, "policy.std.min: 0.1 → 0.2"),
        ({"policy": GAUSSIAN}, {"policy": {**GAUSSIAN, "std": 0.5}}, r"policy.std: .* → 0.5"),
    ],
)
def test_a_policy_of_another_kind_is_none_to_start_from(saved_with, given, problem, tmp_path):
    origin = saved(tmp_path, "box_float64", **saved_with)
    config = config_for(dtype="float64", **given)
    policy = random_policy(config, OBS_DIM, origin.action_space)
    before = policy.theta.vector.clone()
    with pytest.raises(CheckpointError, match=f"the settings of the policy differ .{problem}"):
        origin.copy_to(policy, config, origin.action_space)
    assert torch.equal(policy.theta.vector, before)


def test_a_given_std_may_be_another_than_that_of_the_policy_to_start_from(tmp_path):
    origin = saved(tmp_path, "box", policy={**GAUSSIAN, "std": 0.5})
    config = config_for(dtype="float64", policy={**GAUSSIAN, "std": 0.3})
    policy = random_policy(config, OBS_DIM, SPACES["box"], seed=9)
    origin.copy_to(policy, config, SPACES["box"])
    assert torch.equal(policy.theta.vector, origin.policy.theta.vector)


def test_a_policy_of_other_spaces_is_none_to_start_from(tmp_path):
    origin = saved(tmp_path, "box")
    wider, other = random_policy(origin.config, OBS_DIM + 1, SPACES["box"]), SPACES["discrete"]
    with pytest.raises(CheckpointError, match=r"observes 5 numbers, the environment gives 6"):
        origin.copy_to(wider, origin.config, SPACES["box"])
    with pytest.raises(CheckpointError, match=r"(?s)its actions are Box.*, the environment's Discrete"):
        origin.copy_to(random_policy(origin.config, OBS_DIM, other), origin.config, other)


def test_it_evaluates_itself_where_it_was_trained_unless_that_names_code() -> None:
    policy = load_policy(PROJECT / "pretrained" / "CartPole-v1")
    settings = {"episodes": 3, "seed": 5, "deterministic": False}
    expected = evaluate(policy.policy, policy.config.env, policy.action_space, **settings)
    assert policy.evaluate(**settings) == expected
    named = policy.config.env.model_copy(update={"id": "nowhere_to_be_found:Env-v0"})
    other = replace(policy, config=policy.config.model_copy(update={"env": named}))
    with pytest.raises(UntrustedCodeError, match="nowhere_to_be_found"):
        other.evaluate(episodes=1, seed=0)
    with pytest.raises(EnvError, match="nowhere_to_be_found"):
        other.evaluate(episodes=1, seed=0, trust_code=True)
