"""`VectorEnvAdapter`: any `gymnasium.vector.VectorEnv`, in any autoreset mode, as a `BatchEnv`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from gymnasium.spaces.utils import flatten
from gymnasium.vector import AutoresetMode, VectorEnv
from torch import Tensor

from trpo.envs.contract import Step, native_actions
from trpo.envs.returned import SUCCESS_KEYS, ReturnError, check_finite, numbers_of, success_of
from trpo.envs.shard import restart_seed
from trpo.envs.single import close_env, failure
from trpo.envs.spaces import ActionEncoding, Array, check_observation_space, flatten_batch, is_flat, row_space
from trpo.envs.step_buffers import EnvSpaces, StepBuffers
from trpo.errors import EnvError


class VectorEnvAdapter:
    """A Gymnasium vector environment, made by `gymnasium.make_vec` or by hand, with its autoreset settled.

    NEXT_STEP: the row after an episode's end is a reset and no transition, so not valid. SAME_STEP: the successor at an
    episode's end is `infos["final_obs"]`. DISABLED: ended environments are reset here, in the same step.
    A vector environment cannot be restored: `load_state_dict` starts new episodes.

    Args:
        vector_env: Closed by `close`.
        seed: Given to the first reset only: one for all, or where the environment takes it one for each.
        info: Names of numbers in the last info of an episode, for `Step.info`.

    Raises:
        EnvError: A space is not supported, or the autoreset mode is not declared in `metadata`.
    """

    exact_resume = False

    def __init__(
        self,
        vector_env: VectorEnv[Any, Any, Any],
        seed: int | Sequence[int] | None = None,
        *,
        info: Sequence[str] = (),
    ) -> None:
        name = type(vector_env.unwrapped).__name__
        self._env = vector_env
        self._first_seed = self._seed = seed
        self.info_names = tuple(info)
        self._mode = _autoreset_mode(vector_env, name)
        self._raw_space = vector_env.single_observation_space
        check_observation_space(self._raw_space, name)
        self._encoding = ActionEncoding.of(vector_env.single_action_space, name)
        self.num_envs = vector_env.num_envs
        self.device = torch.device("cpu")
        self.single_observation_space = row_space(self._raw_space)
        self.single_action_space = vector_env.single_action_space
        self.unflattened_observation_space = self._raw_space
        spaces = EnvSpaces(
            self.single_observation_space, self._raw_space, self._raw_space, self.single_action_space, len(info)
        )
        self._buffers = StepBuffers.allocate(spaces, self.num_envs)
        self._step = Step.over(self._buffers)
        self._steps = 0
        self._ended = np.zeros(self.num_envs, bool)  # in the last step; in mode NEXT_STEP the next one is a reset

    def reset(self) -> Tensor:
        """See `BatchEnv.reset`."""
        seed, self._seed = self._seed, None
        try:
            obs, _ = self._env.reset(seed=seed)  # type: ignore[arg-type]
        except Exception as error:
            raise failure("the vector environment, in reset,", error) from error
        self._write(self._buffers.reset_obs, obs)
        self._buffers.valid[:] = True
        self._ended[:] = False
        check_finite(self._buffers.reset_obs, "a first observation", self._where)
        return self._step.reset_obs

    def step(self, action: Tensor) -> Step:
        """See `BatchEnv.step`."""
        buffers = self._buffers
        native = native_actions(self._encoding, action, self.num_envs)
        resets = self._ended if self._mode is AutoresetMode.NEXT_STEP and self._ended.any() else None
        try:
            obs, reward, terminated, truncated, infos = self._env.step(self._encoding.batched(native))
        except Exception as error:
            raise failure(f"the vector environment, after {self._steps} steps,", error) from error
        self._steps += 1
        for target, values in (
            (buffers.reward, reward),
            (buffers.terminated, terminated),
            (buffers.truncated, truncated),
        ):
            _copy(target, values)
        buffers.valid[:] = True
        if resets is not None:
            buffers.reward[resets] = 0.0
            buffers.valid[resets] = buffers.terminated[resets] = buffers.truncated[resets] = False
        self._ended = buffers.terminated | buffers.truncated
        self._settle(obs, self._ended, infos)
        check_finite(buffers.reward, "a reward", self._where)
        check_finite(buffers.next_obs, "an observation", self._where)
        if self._ended.any():  # else both observations are the same
            check_finite(buffers.reset_obs, "a first observation", self._where)
        return self._step

    def state_dict(self) -> dict[str, Any]:
        """How far they came, which tells new episodes from earlier ones; nothing can be restored (`exact_resume`)."""
        return {"steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> Tensor:
        """Starts new episodes, since nothing can be restored, by other seeds than those that were given, if any."""
        self._steps = state.get("steps", 0)
        given = self._first_seed
        if isinstance(given, Sequence):
            self._seed = [restart_seed(seed, self._steps) for seed in given]
        elif given is not None:
            self._seed = restart_seed(given, self._steps)
        return self.reset()

    def close(self) -> None:
        """See `BatchEnv.close`."""
        close_env(self._env)

    def _settle(self, obs: Any, done: Array, infos: dict[str, Any]) -> None:
        """Writes the true successors, what to act on next, and the success of the episodes that ended."""
        buffers = self._buffers
        self._write(buffers.next_obs, obs)
        np.copyto(buffers.reset_obs, buffers.next_obs)
        buffers.success[:] = np.nan
        buffers.info[:] = np.nan
        if not done.any():
            return
        last_infos = infos
        if self._mode is AutoresetMode.SAME_STEP:
            self._write_final(infos, done)
            last_infos = infos.get("final_info", {})
        elif self._mode is AutoresetMode.DISABLED:
            try:
                first_obs, _ = self._env.reset(options={"reset_mask": done.copy()})
            except Exception as error:
                raise failure(f"the vector environment, after {self._steps} steps, in reset,", error) from error
            buffers.reset_obs[done] = self._rows(first_obs)[done]
        for i in np.flatnonzero(done).tolist():
            try:
                info = _part(last_infos, (*SUCCESS_KEYS, *self.info_names), i)
                buffers.success[i] = success_of(info)
                buffers.info[i] = numbers_of(info, self.info_names)
            except ReturnError as error:
                raise failure(f"environment {i}", error) from error

    def _write_final(self, infos: dict[str, Any], done: Array) -> None:
        final = infos.get("final_obs")
        for i in np.flatnonzero(done):
            if final is None or final[i] is None:
                raise EnvError(
                    f"environment {i} ended an episode without infos['final_obs'], though the vector environment "
                    "declares AutoresetMode.SAME_STEP: report it there, or declare the mode it has"
                )
            self._buffers.next_obs[i] = flatten(self._raw_space, final[i])

    def _rows(self, obs: Any) -> Array:
        return flatten_batch(self._raw_space, obs, self.num_envs)

    def _write(self, target: Array, obs: Any) -> None:
        rows = self._rows(obs)
        if rows.shape != target.shape or (is_flat(self._raw_space) and rows.dtype != self._raw_space.dtype):
            raise EnvError(
                f"the vector environment returned observations {rows.dtype}{list(rows.shape)}, its "
                f"single_observation_space says {self._raw_space.dtype} and {list(target.shape)}: return that, or "
                "declare the space as it is"
            )
        target[:] = rows

    def _where(self, i: int) -> str:
        return f"environment {i}, after {self._steps} steps,"


def _autoreset_mode(env: VectorEnv[Any, Any, Any], name: str) -> AutoresetMode:
    declared = (env.metadata or {}).get("autoreset_mode")
    try:
        return AutoresetMode(declared)
    except ValueError as error:
        raise EnvError(
            f"{name} declares autoreset_mode {declared!r}: set metadata['autoreset_mode'] to a member of "
            "gymnasium.vector.AutoresetMode, since a wrong guess corrupts every episode's end"
        ) from error


def _part(infos: dict[str, Any], keys: Sequence[str], i: int) -> dict[str, Any]:
    """Environment i's part of a vector environment's infos [N] with these keys; `_key` says where `key` counts."""
    given = {key: infos[key] for key in keys if isinstance(infos.get(key), np.ndarray)}
    return {key: values[i] for key, values in given.items() if f"_{key}" not in infos or infos[f"_{key}"][i]}


def _copy(target: Array, values: Any) -> None:
    array = np.asarray(values)
    if array.shape != target.shape:
        raise EnvError(f"the vector environment returned an array of shape {array.shape}, not {target.shape}")
    target[:] = array
