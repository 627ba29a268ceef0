"""Trust Region Policy Optimization: `load_config`, `Trainer`, `load_policy`.

Names are imported on first use, so that environment worker processes, which import `trpo.envs.…`, never load torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trpo.config import Config
    from trpo.config.file import load_config
    from trpo.evaluation import evaluate
    from trpo.run.saved_policy import SavedPolicy, load_policy
    from trpo.trainer import Trainer

__version__ = "0.1.0"
__all__ = ["Config", "SavedPolicy", "Trainer", "evaluate", "load_config", "load_policy"]

_HOMES = {
    "Config": "trpo.config",
    "load_config": "trpo.config.file",
    "evaluate": "trpo.evaluation",
    "SavedPolicy": "trpo.run.saved_policy",
    "load_policy": "trpo.run.saved_policy",
    "Trainer": "trpo.trainer",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'trpo' has no attribute {name!r}")
