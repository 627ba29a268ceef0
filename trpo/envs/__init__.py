"""Environments: `make_envs` for a batch to train on, `make_single_env` for one to look at.

torch and the backends are imported when asked for: worker processes import this package too, and need neither.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, assert_never

from trpo.config import EnvConfig
from trpo.envs.single import make_single_env

if TYPE_CHECKING:
    import torch

    from trpo.envs.contract import BatchEnv

__all__ = ["make_envs", "make_single_env"]

_log = logging.getLogger(__name__)


def make_envs(
    config: EnvConfig,
    seeds: Sequence[int],
    *,
    device: torch.device | None = None,
    on_warning: Callable[[str], None] = _log.warning,
) -> BatchEnv:
    """Environments stepped side by side on the backend that `config.backend` names.

    `auto` is `mujoco` where that can be and `gymnasium` otherwise: the numbers are the same.

    Args:
        config: The environment and how to run it. `config.num_envs` plays no part: a process may have a share of them.
        seeds: One per environment, given to its first reset. At least one.
        device: Where environments written in torch live, by default the CPU; the others are always there.
        on_warning: Gets a line for each worker that is replaced, and why episodes that were saved do not go on.

    Raises:
        EnvError: The environment cannot be built or is not supported.
    """
    match config.backend:
        case "gymnasium-async":
            from trpo.envs.workers import WorkerEnvs

            return WorkerEnvs(config, seeds, on_warning=on_warning)
        case "envpool":
            from trpo.envs.envpool import EnvpoolEnvs

            return EnvpoolEnvs(config, seeds)
        case "torch":
            import torch

            from trpo.envs.torch_native import TorchEnvs

            return TorchEnvs(config, seeds, device=device or torch.device("cpu"), on_warning=on_warning)
        case "auto" | "gymnasium" | "mujoco":
            from trpo.envs.gymnasium import GymnasiumEnvs

            return GymnasiumEnvs(config, seeds, on_warning=on_warning)
        case _:
            assert_never(config.backend)
