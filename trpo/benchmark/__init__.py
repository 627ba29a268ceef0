"""Benchmarks: what training reaches (`learning`), how fast it gets there (`speed`), ours and other implementations'.

Names are imported on first use: the processes that measure other implementations load as little of ours as they can.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trpo.benchmark.learning import AGENTS, SUITES, load_results, plan, run, train_one, write_tables
    from trpo.benchmark.speed import run_speed

__all__ = ["AGENTS", "SUITES", "load_results", "plan", "run", "run_speed", "train_one", "write_tables"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("trpo.benchmark." + ("speed" if name == "run_speed" else "learning")), name)
    raise AttributeError(f"module 'trpo.benchmark' has no attribute {name!r}")
