"""Trust Region Policy Optimization: `load_config`, `Trainer`, `load_policy`.

Names are imported on first use, so that environment worker processes, which import `trpo.envs.…`, never load torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trpo.agent import Agent
    from trpo.batch import Batch
    from trpo.config import Config
    from trpo.config.file import load_config
    from trpo.envs.contract import BatchEnv
    from trpo.envs.vector import VectorEnvAdapter
    from trpo.evaluation import evaluate
    from trpo.natural_gradient import trust_region_step
    from trpo.policy import Policy
    from trpo.run.saved_policy import SavedPolicy, load_policy
    from trpo.trainer import Trainer

__version__ = "0.1.0"
__all__ = [
    "Agent",
    "Batch",
    "BatchEnv",
    "Config",
    "Policy",
    "SavedPolicy",
    "Trainer",
    "VectorEnvAdapter",
    "evaluate",
    "load_config",
    "load_policy",
    "trust_region_step",
]

_HOMES = {
    "Agent": "trpo.agent",
    "Batch": "trpo.batch",
    "Config": "trpo.config",
    "load_config": "trpo.config.file",
    "BatchEnv": "trpo.envs.contract",
    "VectorEnvAdapter": "trpo.envs.vector",
    "evaluate": "trpo.evaluation",
    "trust_region_step": "trpo.natural_gradient",
    "Policy": "trpo.policy",
    "SavedPolicy": "trpo.run.saved_policy",
    "load_policy": "trpo.run.saved_policy",
    "Trainer": "trpo.trainer",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'trpo' has no attribute {name!r}")
