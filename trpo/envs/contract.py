"""What the collector asks of an environment backend, `BatchEnv` and `Step`, and what backends do in the same way.

The collector sees no autoreset mode. Whatever a backend does at an episode's end, its adapter settles it here, so that
`next_obs` is always the true successor and `reset_obs` what to act on next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol, Self

import torch
from gymnasium.spaces import Box, Space
from torch import Tensor

from trpo.envs.spaces import ActionEncoding, Array
from trpo.envs.step_buffers import StepBuffers
from trpo.errors import EnvError

NEW_EPISODES = "{}; the run goes on with new episodes"  # why, from a backend that could not go on with the old ones


@dataclass(frozen=True, slots=True)
class Step:
    """One step of N environments.

    Tensors may be the adapter's own buffers, valid until the next call to `step` or `reset`: copy what is to be kept,
    `reset_obs` too, before acting again.
    """

    next_obs: Tensor  # [N, D] true successor of the state acted in, the final observation where an episode ended
    reset_obs: Tensor  # [N, D] what to act on next: next_obs, or the first observation of a new episode
    reward: Tensor  # [N] float64 (Gymnasium's own), unscaled
    terminated: Tensor  # [N] bool, the task ended: no value beyond
    truncated: Tensor  # [N] bool, time limit or cut: the value beyond is V(next_obs)
    valid: Tensor  # [N] bool, False where the row is no transition: a reset, or lost with its worker
    success: Tensor | None = None  # [N] float, where an episode ended and reported it (`returned.success_of`), else NaN
    info: Tensor | None = None  # [N, I] float, what it reported then under the names in `env.info`, else NaN

    @classmethod
    def over(cls, buffers: StepBuffers) -> Self:
        """The buffers as tensors, without a copy: what is written to the arrays later shows in the tensors."""
        return cls(**{field.name: torch.from_numpy(getattr(buffers, field.name)) for field in fields(cls)})


class BatchEnv(Protocol):
    """N environments stepped together.

    Where resets can be told what to begin with there is also `set_options(options)`: what every environment's `reset`
    is given from now on. `state_dict` has those of the running episodes.

    Environments that cut their first episodes (`envs/stagger.py`) say so in `staggered`.

    Environments that fill `Step.info` may say what its columns are, in `info_names`.

    Where many steps can be one operation of a device there is also `in_one(run, steps)`: a function that does what
    `run` does, which steps so many times.
    """

    num_envs: int
    device: torch.device
    single_observation_space: Box  # flat: Box(shape=(D,))
    unflattened_observation_space: Space[Any]  # what it is flattened from; may be absent: only saved policies use it
    single_action_space: Space[Any]  # Box, Discrete, MultiDiscrete or MultiBinary, as the environment declares it
    exact_resume: bool  # whether load_state_dict restores the environments to the bit; after it, whether it did

    def reset(self) -> Tensor:
        """Starts N new episodes; observations [N, D]. Seeds were given at construction, for the first reset only."""

    def step(self, action: Tensor) -> Step:
        """Acts. `action` [N, A] unclipped, in the policy's encoding; clipped to a Box space here, at the boundary."""

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on exactly from here: tensors, arrays, and what JSON can hold."""

    def load_state_dict(self, state: dict[str, Any]) -> Tensor:
        """Restores `state_dict`, or where that is impossible begins new episodes, with `exact_resume` off; returns the
        observations [N, D] to act on next."""

    def close(self) -> None:
        """Frees everything; may be called twice."""


def check_batch_env(env: object, info: Sequence[str]) -> None:
    """Raises `EnvError` unless an environment made by hand is a `BatchEnv` that reports `env.info`."""
    members = {*BatchEnv.__annotations__, *vars(BatchEnv)} - {"unflattened_observation_space"}
    if missing := sorted(name for name in members if not name.startswith("_") and not hasattr(env, name)):
        raise EnvError(
            f"env is a {type(env).__name__} without {', '.join(missing)}, no BatchEnv: put what gymnasium.make_vec "
            "makes into trpo.envs.vector.VectorEnvAdapter"
        )
    if (names := getattr(env, "info_names", None)) is not None and tuple(names) != tuple(info):
        raise EnvError(f"env.info is {[*info]}, and the environments given report {[*names]}: make them agree")


def native_actions(encoding: ActionEncoding, action: Tensor, num_envs: int) -> Array:
    """The policy's actions [N, A] as native rows; `EnvError` if they are not N rows of A finite numbers."""
    if action.shape[0] != num_envs:
        raise EnvError(f"action has shape {tuple(action.shape)}; {num_envs} environments take [{num_envs}, A]")
    return encoding.native(action.detach().cpu().numpy())


def check_env_count(states: Sequence[Any], num_envs: int) -> None:
    """Raises `EnvError` if a state is for another number of environments."""
    if len(states) != num_envs:
        raise EnvError(
            f"the state holds {len(states)} environments, this run has {num_envs}: "
            f"resume with env.num_envs and the number of processes of the run that wrote it"
        )
