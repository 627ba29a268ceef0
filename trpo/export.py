"""A saved policy → ONNX: one file with the normaliser and the action bounds inside, checked before it is there."""

from __future__ import annotations

import contextlib
import importlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trpo.distributions import DiagonalGaussian
from trpo.envs.spaces import ActionEncoding
from trpo.errors import UserError, gist
from trpo.networks.action_mask import FAR
from trpo.run.saved_policy import SavedPolicy
from trpo.run.whole_file import whole_file

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
CHECK_SIZES = (1, 5, 64)  # batch sizes of the round trip
TOLERANCE = 1e-4  # of the round trip, relative to the largest output: two float32 libraries differ by some 1e-6


def export_onnx(saved: SavedPolicy, path: str | Path) -> None:
    """Writes the deterministic policy as an ONNX model.

    Input `observation` [N, D] float32, as the environment gives it; output `action` [N, …] as the environment takes it:
    clipped to a Box space, counted from `start` in a Discrete one, in the space's shape and dtype. N is free. The
    metadata has both spaces: a dict or tuple is flattened in the order in which its space has the parts.

    The model is run on random and extreme observations and compared with `SavedPolicy.act` before it is moved to
    `path`, over what may be there; on any error nothing is left.

    Raises:
        UserError: a package is missing, or has no operator for a layer; the file cannot be written; or the model does
            not act as the policy does.
    """
    _check_packages()
    try:
        with whole_file(Path(path)) as file:
            with _saying("torch cannot write this policy as an ONNX model"):
                _write(saved, file)
            problem = _difference(saved, file.read_bytes())
            if problem:
                raise UserError(f"not exported: the ONNX model does not act as the policy does ({problem})")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


class ActingPolicy(nn.Module):
    """Observations [N, D] → actions as the environment takes them: what `SavedPolicy.act` does, in torch alone."""

    def __init__(self, saved: SavedPolicy):
        super().__init__()
        encoding, theta = ActionEncoding.of(saved.action_space), saved.policy.theta.vector
        self.normalizer = saved.policy.normalizer
        self.network = saved.policy.network
        self._mode = saved.policy.distribution.mode
        self._shape = encoding.shape
        self._dtype = torch_dtype(encoding.dtype)
        # Clipping happens in numpy's common type of action and bounds, so that bounds keep all their digits.
        wide = torch_dtype(np.result_type(encoding.dtype, str(theta.dtype).removeprefix("torch.")))
        self._low, self._high = (
            None if bound is None else torch.as_tensor(bound).to(theta.device, wide)
            for bound in (encoding.low, encoding.high)
        )
        self._start = None if encoding.start is None else torch.as_tensor(encoding.start).to(theta.device, torch.int64)

    def forward(self, observation: Tensor) -> Tensor:
        action = self._mode(self.network(self.normalizer(observation)))
        if self._low is not None and self._high is not None:
            action = torch.maximum(torch.minimum(action.to(self._low.dtype), self._high), self._low)
            if not self._dtype.is_floating_point:
                action = action.round()
        if self._start is not None:
            action = action + self._start
        return action.to(self._dtype).reshape(-1, *self._shape)


def torch_dtype(dtype: np.dtype[Any]) -> torch.dtype:
    return torch.from_numpy(np.empty(0, dtype)).dtype


def _check_packages() -> None:
    for name in PACKAGES:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UserError(f"ONNX export needs {name} ({error}): pip install 'trpo[export]'") from error


def _write(saved: SavedPolicy, file: Path) -> None:
    # Two rows: an exporter may take a batch of one for a constant.
    example = torch.zeros(2, saved.obs_dim, device=saved.policy.device)
    with warnings.catch_warnings(), _quiet("torch.onnx"), torch.no_grad():
        warnings.simplefilter("ignore")  # about the exporter's own insides
        program = torch.onnx.export(
            ActingPolicy(saved).eval(),
            (example,),
            dynamo=True,
            input_names=["observation"],
            output_names=["action"],
            dynamic_shapes={"observation": {0: torch.export.Dim("N")}},
            verbose=False,
        )
        assert program is not None
    model = program.model_proto
    for node in model.graph.node:
        del node.metadata_props[:]  # the exporter's stack traces, with the paths of this machine
    about = {
        "environment": saved.config.env.id,
        "env_steps": saved.info.get("env_steps"),
        "observation_space": saved.observation_space,  # of which `observation` has the parts in this order
        "action_space": saved.action_space,
    }
    for key, value in about.items():
        if value is not None:
            model.metadata_props.add(key=key, value=str(value))
    file.write_bytes(model.SerializeToString())


@contextlib.contextmanager
def _saying(what: str) -> Iterator[None]:
    """Turns what other packages raise, and each has kinds of its own, into one line."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise UserError(f"not exported: {what} ({gist(error)}); train with other layers, or dtype float32") from error


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Mutes a logger below the level of errors."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _difference(saved: SavedPolicy, model: bytes) -> str | None:
    """How the model's actions differ from the policy's; None if they do not."""
    import onnxruntime

    with _saying("onnxruntime cannot run the model"):
        session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()], [node.name for node in session.get_outputs()]
    if names != (["observation"], ["action"]):
        return f"its inputs and outputs are {names}"
    generator = np.random.default_rng(0)
    for rows in CHECK_SIZES:
        obs = _observations(saved, rows, generator)
        with _saying("onnxruntime cannot run the model"):
            (action,) = session.run(None, {"observation": obs})
        expected = saved.act(obs)
        if action.shape != expected.shape or action.dtype != expected.dtype:
            return f"{action.dtype}{list(action.shape)} instead of {expected.dtype}{list(expected.shape)}"
        wrong = _wrong_rows(saved, obs, action, expected)
        if wrong.any():
            row = int(wrong.argmax())
            return f"{action[row].tolist()} instead of {expected[row].tolist()} in {wrong.sum()} of {rows} tests"
    return None


def _observations(saved: SavedPolicy, rows: int, generator: np.random.Generator) -> np.ndarray:
    """Observations [rows, D] around those seen in training, and in turn 10, 1000 and a million times as far out."""
    moments = saved.policy.normalizer.moments
    mean, std = moments.mean.cpu().numpy(), moments.variance.sqrt().cpu().numpy()
    reach = np.resize([1.0, 10.0, 1e3, 1e6], rows)[:, None]
    return (mean + reach * np.maximum(std, 1e-3) * generator.standard_normal((rows, len(mean)))).astype(np.float32)


@torch.inference_mode()
def _wrong_rows(saved: SavedPolicy, obs: np.ndarray, action: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Which rows [N] of `action` are no actions, or differ from the expected ones by more than rounding explains."""
    policy, encoding = saved.policy, ActionEncoding.of(saved.action_space)
    distribution = policy.distribution
    eta = policy(policy.normalizer(torch.from_numpy(obs).to(policy.device))).cpu().double()
    tolerance = TOLERANCE * eta.where(eta > -FAR / 2, 0.0).abs().amax(-1).clamp(min=1.0)  # what is ruled out is exact
    outside = torch.tensor([not saved.action_space.contains(row) for row in action])
    given, wanted = (torch.from_numpy(x.reshape(len(obs), -1).astype(np.float64)) for x in (action, expected))
    if encoding.low is not None and encoding.high is not None:
        # A Gaussian's η are actions; of others that have bounds, actions are as large as these are wide, whatever η is.
        width = torch.from_numpy(encoding.high.astype(float) - encoding.low.astype(float))
        allowed = tolerance.unsqueeze(-1) * (1.0 if isinstance(distribution, DiagonalGaussian) else width)
        # Rounding to an integer Box may go either way near one half: the distance to what is rounded counts there.
        if encoding.dtype.kind != "f":
            wanted = torch.from_numpy(np.clip(distribution.mode(eta).numpy(), encoding.low, encoding.high))
            allowed = allowed + 0.5
        return (outside | ((given - wanted).abs() > allowed).any(-1)).numpy()
    # Between two choices that are equally likely to rounding, either is the mode.
    start = 0 if encoding.start is None else torch.from_numpy(encoding.start)
    given = torch.where(outside.unsqueeze(-1), wanted, given)
    lost = distribution.log_prob(eta, wanted - start) - distribution.log_prob(eta, given - start)
    return (outside | (lost > tolerance)).numpy()
