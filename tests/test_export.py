"""ONNX models act as the saved policy does, for every action space, and a model that does not is never left behind."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from commands import config_for, one_line, run_script, saved_policy
from gymnasium import spaces

from trpo import export
from trpo.errors import UserError
from trpo.export import ActingPolicy, export_onnx
from trpo.run.saved_policy import SavedPolicy

OBS_DIM = 6
SPACES: dict[str, spaces.Space[Any]] = {
    "box": spaces.Box(np.float32([[-0.5, -np.inf], [-0.2, 0.1]]), np.float32([[0.5, 0.3], [np.inf, 0.4]])),
    "box_bounded": spaces.Box(np.float32([-0.5, 0.1]), np.float32([0.5, 0.4])),
    "box_int": spaces.Box(-2, 3, (3,), np.int32),
    "discrete": spaces.Discrete(4, start=-2),
    "multi_discrete": spaces.MultiDiscrete([[2, 3], [4, 5]], start=[[1, 0], [-3, 7]]),
    "multi_binary": spaces.MultiBinary([2, 3]),
}


def saved(path: Path, space: str = "discrete", **changes: Any) -> SavedPolicy:
    changes = {"policy": {"hidden_sizes": (8, 8), "bins": 11}} | changes  # ordinal where bounded
    return saved_policy(path / "policy", config_for(**changes), OBS_DIM, SPACES[space])


@pytest.mark.parametrize("space", SPACES)
def test_the_model_acts_as_the_policy_for_any_number_of_observations(space, tmp_path):
    policy = saved(tmp_path, space)
    export_onnx(policy, tmp_path / "new" / "policy.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "new" / "policy.onnx")
    (given,), (result,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.type, given.shape[1:]) == ("observation", "tensor(float)", [OBS_DIM])
    assert (result.name, result.shape[1:]) == ("action", list(SPACES[space].shape))
    for rows in (1, 2, 37):
        # Wide enough that normalised observations reach their clip, and actions the bounds of a Box.
        obs = np.random.default_rng(rows).normal(0.5, 10.0, (rows, OBS_DIM)).astype(np.float32)
        (action,) = session.run(["action"], {"observation": obs})
        expected = policy.act(obs)
        assert action.shape == expected.shape and action.dtype == expected.dtype
        # Integers: these observations, fixed by the seed, meet no tie. Floats: two float32 libraries.
        np.testing.assert_allclose(action, expected, rtol=0, atol=1e-5 if action.dtype.kind == "f" else 0)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["policy.onnx"]


def test_bounds_of_a_float64_space_hold_for_a_float32_network(tmp_path):
    """0.1 and 0.3 are no float32 numbers: clipping in float32 would leave the space."""
    space = spaces.Box(np.array([0.1, -1.0]), np.array([0.3, 1.0]), dtype=np.float64)
    changes: dict[str, Any] = {"hidden_sizes": (), "bins": None, "std": {"state_dependent": True}}
    policy = saved_policy(tmp_path / "policy", config_for(policy=changes), OBS_DIM, space)
    export_onnx(policy, tmp_path / "policy.onnx")
    obs = np.random.default_rng(0).normal(0.5, 10.0, (50, OBS_DIM)).astype(np.float32)
    (action,) = onnxruntime.InferenceSession(tmp_path / "policy.onnx").run(None, {"observation": obs})
    assert {0.1, 0.3} <= set(action[:, 0].tolist())
    assert all(space.contains(row) for row in action)


def test_a_link_and_a_pipe_stay_what_they_are(tmp_path):
    policy = saved(tmp_path)
    target, link, pipe = (tmp_path / name for name in ("target.onnx", "link.onnx", "pipe"))
    target.write_bytes(b"old")
    link.symlink_to(target)
    export_onnx(policy, link)
    assert link.is_symlink() and onnx.load(target).graph.output[0].name == "action"
    os.mkfifo(pipe)
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    export_onnx(policy, pipe)
    reader.join(timeout=30)
    descriptors: list[int] = [*os.pipe()]  # as of a shell's `>(…)`, which has no place of its own
    export_onnx(policy, Path(f"/dev/fd/{descriptors[1]}"))
    os.close(descriptors[1])
    with open(descriptors[0], "rb") as end:  # a pipe holds as much as a model of this size
        assert onnx.load_from_string(end.read()).graph.output[0].name == "action"
    assert pipe.is_fifo() and onnx.load_from_string(read[0]).graph.output[0].name == "action"


def test_the_model_says_what_it_is_and_nothing_about_this_machine(tmp_path):
    changes: dict[str, Any] = {"hidden_sizes": (8,), "activation": "silu"}
    policy = saved(tmp_path, "box", dtype="float64", policy=changes, normalize={"observations": False})
    export_onnx(policy, tmp_path / "policy.onnx")
    model = onnx.load(tmp_path / "policy.onnx")
    assert {item.key: item.value for item in model.metadata_props} == {
        "environment": "CartPole-v1",
        "env_steps": "4096",
        "action_space": str(SPACES["box"]),
    }
    assert str(Path(export.__file__).parent).encode() not in (tmp_path / "policy.onnx").read_bytes()


def test_either_of_two_equally_likely_choices_is_right_and_no_third(tmp_path):
    policy = saved(tmp_path, "discrete")
    head = policy.policy.network.layers[-1]
    with torch.no_grad():  # choices 0 and 1 equal, 2 and 3 far less likely
        head.weight.zero_()
        head.bias.copy_(torch.tensor([1.0, 1.0, 0.0, -1.0]))
    obs = np.zeros((5, OBS_DIM), np.float32)
    given = np.array([0, 1, 2, 3, 4]) + SPACES["discrete"].start
    wrong = export._wrong_rows(policy, obs, given, policy.act(obs))
    assert wrong.tolist() == [False, False, True, True, True]  # the last is no action at all


def test_wide_actions_may_differ_by_as_much_as_rounding_does(tmp_path):
    """An ordinal policy's parameters are of order one, whatever the unit of its actions."""
    space = spaces.Box(-1e6, 1e6, (2,), np.float64)
    policy = saved_policy(tmp_path / "policy", config_for(), OBS_DIM, space)
    export_onnx(policy, tmp_path / "policy.onnx")
    obs = np.random.default_rng(0).normal(0.5, 1.0, (50, OBS_DIM)).astype(np.float32)
    (action,) = onnxruntime.InferenceSession(tmp_path / "policy.onnx").run(None, {"observation": obs})
    expected = policy.act(obs)
    assert np.abs(expected).max() > 1e3  # else nothing is shown
    # Some roundings of float32 of a range of 2e6, which was more than the export used to allow.
    np.testing.assert_allclose(action, expected, rtol=0, atol=20.0)
    assert export._wrong_rows(policy, obs, np.clip(expected + 2e3, -1e6, 1e6), expected).all()


def test_what_other_packages_cannot_do_is_one_line(tmp_path):
    """onnxruntime has this activation for float32 only; torch cannot translate a branch on values."""
    with pytest.raises(UserError, match=r"onnxruntime cannot run the model .*Elu.*; train with other layers"):
        export_onnx(saved(tmp_path, dtype="float64", policy={"activation": "elu"}), tmp_path / "policy.onnx")
    policy = saved(tmp_path / "other")
    policy.policy.network.register_forward_hook(lambda _, __, eta: eta if eta.sum() > 0 else -eta)
    with pytest.raises(UserError, match="torch cannot write this policy as an ONNX model"):
        export_onnx(policy, tmp_path / "policy.onnx")
    assert not (tmp_path / "policy.onnx").exists()


class Unclipped(ActingPolicy):
    def __init__(self, policy: SavedPolicy) -> None:
        super().__init__(policy)
        self._low = None


class WithoutStart(ActingPolicy):
    def __init__(self, policy: SavedPolicy) -> None:
        super().__init__(policy)
        self._start = None


class Unnormalised(ActingPolicy):
    def forward(self, observation):
        return super().forward(observation * self.normalizer.scale.reciprocal())


class WrongShape(ActingPolicy):
    def forward(self, observation):
        return super().forward(observation).unsqueeze(-1)


WRONG = [
    (Unclipped, "box_int"),
    (WithoutStart, "multi_discrete"),
    (Unnormalised, "box"),
    (WrongShape, "discrete"),
]


@pytest.mark.parametrize(("wrong", "space"), WRONG)
def test_a_model_that_acts_otherwise_is_an_error_and_no_file(wrong, space, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "ActingPolicy", wrong)
    policy = saved(tmp_path, space)
    target = tmp_path / "out" / "policy.onnx"
    target.parent.mkdir()
    target.write_text("an older model")
    with pytest.raises(UserError, match="does not act as the policy"):
        export_onnx(policy, target)
    assert target.read_text() == "an older model"
    assert [path.name for path in target.parent.iterdir()] == ["policy.onnx"]


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named_with_what_installs_it(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"needs {package} .*pip install 'trpo\[export\]'"):
        export_onnx(saved(tmp_path), tmp_path / "policy.onnx")


def test_command_writes_the_model_or_says_why_not_in_one_line(tmp_path, capsys, monkeypatch):
    policy = saved(tmp_path)
    (tmp_path / "file").touch()

    def script(*args: object):
        return run_script("export.py", *args, capture=capsys, patch=monkeypatch)

    done = script(policy.path, "--onnx", tmp_path / "policy.onnx")
    assert done.status == 0 and done.err == "" and "policy.onnx" in one_line(done.out)
    onnxruntime.InferenceSession(tmp_path / "policy.onnx")
    for args, problem in (
        ((tmp_path / "nowhere", "--onnx", tmp_path / "a.onnx"), "no such file or directory"),
        ((policy.path, "--onnx", tmp_path / "file" / "a.onnx"), "cannot write"),
        ((policy.path,), "--onnx"),
    ):
        outcome = script(*args)
        assert outcome.status == 2 and outcome.out == ""
        assert problem in one_line(outcome.err)
