"""A trained policy as a directory of its own, such as a run's `final/` and `best/`: safetensors and JSON, no code.

What it holds was perhaps made by somebody else. It is read as numbers and text; that its settings may name code to
import (a module that registers the environment, wrappers) matters first when an environment is built from them, which
is why that is asked for separately: `SavedPolicy.environment`.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.spaces.utils import flatdim
from torch import Tensor

from trpo.config import Config, EnvConfig, LearnedStdConfig
from trpo.config.difference import config_difference
from trpo.distributions import DiagonalGaussian, Ordinal, distribution_for
from trpo.envs.returned import ReturnError, flattened, kind_of
from trpo.envs.space_data import decode_space, encode_observation_space, encode_space
from trpo.envs.spaces import ActionEncoding, is_flat
from trpo.errors import CheckpointError, ConfigError, EnvError, did_you_mean, gist, nearest_path
from trpo.evaluation import Evaluation, evaluate
from trpo.policy import Policy, build_policy
from trpo.run.checkpoint import MANIFEST_FILE, checkpoint_paths, load_state, newest_checkpoint, save_state
from trpo.run.directory import RunDirectory
from trpo.run.trust import UntrustedCodeError, named_code
from trpo.runtime.device import resolve_device

KIND = "trpo policy"


@dataclass(frozen=True)
class SavedPolicy:
    """A policy ready to act, with the settings and figures of the run it came from."""

    policy: Policy
    config: Config
    observation_space: spaces.Space[Any] | None  # as the environment declares it; None where nobody wrote it down
    action_space: spaces.Space[Any]
    info: dict[str, Any]  # env_steps, seed, evaluation figures
    path: Path  # the policy directory it was read from

    @property
    def obs_dim(self) -> int:
        """D, the length of a flat observation."""
        return self.policy.obs_dim

    def environment(self, *, trust_code: bool = False) -> EnvConfig:
        """The settings of the environment it was trained in, to build that from.

        Args:
            trust_code: allow settings that make Python import a module they name. Only for policies whose origin you
                trust: importing a module runs it.

        Raises:
            UntrustedCodeError: the settings name code, and `trust_code` is off.
        """
        env = self.config.env
        named = None if trust_code else named_code(env)
        if named is not None:
            raise UntrustedCodeError(self.path, named, "policy.environment(trust_code=True)")
        return env

    def evaluate(
        self,
        *,
        episodes: int,
        seed: int,
        deterministic: bool = True,
        video: str | Path | None = None,
        render: bool = False,
        trust_code: bool = False,
    ) -> Evaluation:
        """Whole episodes of the environment it was trained in; see `trpo.evaluation.evaluate`, and `environment`."""
        return evaluate(
            self.policy,
            self.environment(trust_code=trust_code),
            self.action_space,
            episodes=episodes,
            seed=seed,
            deterministic=deterministic,
            max_episode_steps=self.config.evaluation.max_episode_steps,
            video=video,
            render=render,
        )

    def act(self, observation: Any, *, deterministic: bool = True, generator: torch.Generator | None = None) -> Any:
        """Actions as the environment takes them: clipped to a Box space, counted from `start` in a Discrete one.

        Args:
            observation: as the environment gives it, a dict, say; or [D] or [N, D], flat (of all but a Box of one axis
                as `gymnasium.wrappers.FlattenObservation` gives it). Not normalised.
            deterministic: the mode of the policy; otherwise a sample.
            generator: source of the samples, on the CPU; torch's own by default.

        Returns:
            One action in the space's shape and dtype (numpy array, or numpy integer for Discrete); N of them stacked
            along a first axis for [N, D].

        Raises:
            ValueError: the observation is none of the environment's, nor flat.
            EnvError: the observation, or the action, is not finite.
        """
        observation = self._rows(observation)
        if not np.isfinite(observation).all():
            raise EnvError("the observation is not finite: the simulation diverged or the environment divides by zero")
        batch = torch.tensor(np.atleast_2d(observation)).to(self.policy.device)
        if deterministic:
            encoded = self.policy.mode(batch)
        else:
            encoded = self.policy.sample(batch, self.policy.noise(len(batch), generator=generator))
        encoding = ActionEncoding.of(self.action_space)
        native = encoding.native(encoded.cpu().numpy())
        return encoding.batched(native) if observation.ndim == 2 else encoding.single(native[0])

    def _rows(self, observation: Any) -> np.ndarray:
        """[D] or [N, D]."""
        space, problem = self.observation_space, ""
        if space is not None and not is_flat(space):
            try:
                return np.asarray(flattened(observation, space))
            except ReturnError as error:
                problem = f", or as the environment does: it {error}"
        if not isinstance(observation, Mapping):
            rows = np.asarray(observation)
            if rows.ndim in (1, 2) and rows.shape[-1] == self.obs_dim:
                return rows
        flat = f"[{self.obs_dim}] or [N, {self.obs_dim}], as gymnasium.wrappers.FlattenObservation gives it"
        raise ValueError(f"the observation is {kind_of(observation)}; expected {flat}{problem}")

    def copy_to(self, policy: Policy, config: Config, action_space: spaces.Space[Any]) -> None:
        """Gives another policy, built from `config`, all parameters and the observation statistics of this one.

        Raises:
            CheckpointError: with these it would not act as this one: what differs.
        """
        obs_dim = policy.obs_dim
        shaping = tuple(_shaping_settings(self.config, config, action_space))
        differences = [line for line in config_difference(self.config, config) if line.startswith(shaping)]
        if self.obs_dim != obs_dim:
            problem = f"it observes {self.obs_dim} numbers, the environment gives {obs_dim}"
        elif self.action_space != action_space:
            problem = f"its actions are {self.action_space}, the environment's {action_space}"
        elif differences:
            problem = f"the settings of the policy differ ({'; '.join(differences)}); set what it was saved with"
        else:
            policy.load_state_dict(self.policy.state_dict())
            return
        raise CheckpointError(f"{self.path} is no policy to start from here: {problem}")


def _shaping_settings(saved: Config, given: Config, action_space: spaces.Space[Any]) -> Iterator[str]:
    """Settings that change what the same parameters compute for such actions, or whether they fit at all."""
    yield from ("policy.body", "policy.action_mask", "normalize.observations")
    if saved.policy.body is None or given.policy.body is None:
        yield from ("policy.hidden_sizes", "policy.activation")
    if given.normalize.observations:
        yield "normalize.clip_observations"
    if isinstance(action_space, spaces.Box):
        yield "policy.bins"
    dtype = getattr(torch, given.dtype)
    if isinstance(distribution_for(action_space, bins=given.policy.bins, dtype=dtype), DiagonalGaussian):
        learned = [isinstance(config.policy.std, LearnedStdConfig) for config in (saved, given)]
        if all(learned):
            yield from ("policy.std.min", "policy.std.max", "policy.std.state_dependent")
        elif any(learned):
            yield "policy.std"


def save_policy(
    path: Path,
    policy: Policy,
    config: Config,
    action_space: spaces.Space[Any],
    info: dict[str, Any],
    *,
    observation_space: spaces.Space[Any] | None = None,
) -> None:
    """Writes a policy directory, replacing an older one safely.

    Args:
        path: the directory.
        policy: what to save.
        config: the settings it was built and trained with.
        action_space: as its environment declares it.
        info: figures, as JSON can hold them.
        observation_space: as its environment declares it, for `SavedPolicy.act` to take what the environment gives.

    Raises:
        CheckpointError: the disk refuses; an older policy there is intact.
    """
    state = {
        "kind": KIND,
        "config": config.model_dump(mode="json", by_alias=True),
        "obs_dim": policy.obs_dim,
        "observation_space": encode_observation_space(observation_space),
        "action_space": encode_space(action_space),
        "policy": dict(policy.state_dict()),
        "info": info,
    }
    save_state(path, state, replace=True)


def load_policy(path: str | Path, *, device: str = "cpu", trust_code: bool = False) -> SavedPolicy:
    """Opens a policy directory, a checkpoint, or a run directory: its `final/`, else `best/`, else newest checkpoint.

    Args:
        path: the directory.
        device: where the policy computes: cpu, cuda, cuda:N or auto.
        trust_code: allow `policy.body`, layers of somebody's own, to make Python import the module it names.

    Raises:
        CheckpointError: nothing there, damaged, or not a policy.
        UntrustedCodeError: it names code, and `trust_code` is off.
        ConfigError: the code that it names cannot be imported, or gives no module that fits.
        UserError: no such device.
    """
    directory, state = _read(Path(path))
    on = resolve_device(device)  # a device that does not exist is not the file's fault
    with _one_kind_of_error(directory):
        return _restore(state, directory, on, trust_code)


def load_starting_policy(path: str | Path, config: Config) -> SavedPolicy:
    """`load_policy` for a new run with `config`, which trusts the layers of one's own (`policy.body`) that it names.

    Raises:
        CheckpointError: as `load_policy`, or its `policy.body` is another than that of `config`.
        ConfigError: as `load_policy`.
    """
    directory, state = _read(Path(path))
    with _one_kind_of_error(directory):
        body, given = _config(state).policy.body, config.policy.body
    if body != given:
        raise CheckpointError(
            f"{path} is no policy to start from here: its policy.body is {body and body.name}, the config's "
            f"{given and given.name}, or their kwargs differ; set what it was saved with"
        )
    with _one_kind_of_error(directory):
        return _restore(state, directory, torch.device("cpu"), trust_code=True)


def _read(path: Path) -> tuple[Path, dict[str, Any]]:
    """The directory of the policy that a path means, and what it holds."""
    directory, state = _policy_directory(path)
    if state is None:
        state = load_state(directory)
    with _one_kind_of_error(directory):
        if isinstance(state, dict) and {"agent", "counters"} <= state.keys():
            return directory, _of_checkpoint(state)
        if not isinstance(state, dict) or state.get("kind") != KIND:
            raise ValueError("it holds something else; give a run, its final/ or a checkpoint")
    return directory, state


def _of_checkpoint(state: dict[str, Any]) -> dict[str, Any]:
    """What `save_policy` would have written where a run wrote a checkpoint. Raises anything if it is none."""
    policy = state["agent"]["policy"]
    return {
        **{key: state[key] for key in ("config", "observation_space", "action_space")},
        "obs_dim": len(policy["normalizer.moments.mean"]),
        "policy": policy,
        "info": {"env_steps": state["counters"]["env_steps"], "seed": state["config"]["seed"]},
    }


@contextlib.contextmanager
def _one_kind_of_error(directory: Path) -> Iterator[None]:
    try:
        yield
    except (ConfigError, UntrustedCodeError):
        raise
    except Exception as error:  # a trust boundary: hostile values raise anything, and users see one kind
        raise CheckpointError(f"{directory} is not a policy this version can open ({gist(error)})") from error


def _config(state: dict[str, Any]) -> Config:
    return Config.model_validate_json(json.dumps(state["config"]))


def _policy_directory(path: Path) -> tuple[Path, Any]:
    """`path` itself if it is a policy, else the one to take of the run at `path`; what it holds, if that was read."""
    if not path.exists():
        meant = nearest_path(path, _directories(path.parent))
        raise CheckpointError(f"{path}: no such file or directory; give a run directory or a saved policy{meant}")
    if not path.is_dir():
        raise CheckpointError(f"{path} is a file; give a run directory or a saved policy, which is a directory too")
    if (path / MANIFEST_FILE).exists():
        return path, None
    run = RunDirectory(path)
    if run.policies:
        return run.policies[0], None
    if (checkpoint := newest_checkpoint(run.checkpoints)) is not None:
        return checkpoint
    if run.config_file.exists():
        damaged = " that is whole" if checkpoint_paths(run.checkpoints) else ""
        raise CheckpointError(
            f"the run {path} has neither a policy nor a checkpoint{damaged}; wait for the first if it is being "
            "trained, else start a new one"
        )
    policies = [found for below in _directories(path) for found in RunDirectory(below).policies]
    newest = sorted(policies, key=lambda found: found.stat().st_mtime)[-1:]
    meant = did_you_mean(found.parent for found in newest)
    raise CheckpointError(f"{path} holds no policy; give a run directory or a saved policy{meant}")


def _directories(path: Path) -> list[Path]:
    """Those in a directory; none if it is none, or cannot be listed."""
    try:
        return [below for below in path.iterdir() if below.is_dir()]
    except OSError:
        return []


def _restore(state: dict[str, Any], directory: Path, device: torch.device, trust_code: bool) -> SavedPolicy:
    """The policy that a state describes. Raises anything if it describes none."""
    config = _config(state)
    if (body := config.policy.body) is not None and not trust_code:
        raise UntrustedCodeError(directory, f"policy.body ({body.name!r})", "load_policy(path, trust_code=True)")
    action_space = decode_space(state["action_space"])
    observation_space = decode_space(state["observation_space"]) if state.get("observation_space") else None
    obs_dim, info = state["obs_dim"], state["info"]
    if type(obs_dim) is not int or not isinstance(info, dict):
        raise ValueError("its obs_dim or info has the wrong type")
    if observation_space is not None and flatdim(observation_space) != obs_dim:
        raise ValueError(f"its observations are {obs_dim} numbers, those of {observation_space} are not")
    _check_sizes(config, obs_dim, action_space, state["policy"])
    rows = spaces.Box(-np.inf, np.inf, (obs_dim,), np.float32)
    generator = torch.Generator().manual_seed(0)  # the weights it draws are overwritten by the saved ones
    observations = rows if observation_space is None else observation_space
    try:
        policy = build_policy(config, observations, action_space, generator=generator, device=device)
    except ConfigError as error:
        if config.policy.body is not None:  # somebody's module, of which the message tells
            raise
        raise ValueError(str(error)) from error  # the file contradicts itself
    policy.load_state_dict(state["policy"])
    tensors = [*policy.parameters(), *policy.normalizer.buffers()]  # a buffer of a body's may be infinite, as masks are
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise ValueError("it holds numbers that are not finite")
    return SavedPolicy(policy, config, observation_space, action_space, info, directory)


def _check_sizes(config: Config, obs_dim: int, action_space: spaces.Space[Any], tensors: dict[str, Tensor]) -> None:
    """Refuses settings that describe larger layers than are stored, before memory is taken for them."""
    if config.policy.body is not None:
        return  # nobody knows how large it is before it is built
    bins = config.policy.bins
    distribution = distribution_for(action_space, bins=bins and 2, dtype=getattr(torch, config.dtype))  # few, for now
    outputs = distribution.action_dim if isinstance(distribution, DiagonalGaussian) else distribution.param_dim
    if bins is not None and isinstance(distribution, Ordinal):
        outputs = distribution.action_dim * bins
    described = sum(rows * columns for rows, columns in pairwise([obs_dim, *config.policy.hidden_sizes, outputs]))
    stored = sum(tensor.numel() for tensor in tensors.values())
    if described > stored:
        raise ValueError(f"its settings describe {described} weights, it holds {stored} numbers")
