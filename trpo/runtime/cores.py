"""How many workers environments and threads updates get."""

from __future__ import annotations

import math
import os
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
_MOST_THREADS = 4  # of an update, unless more are asked for: a batch of 2048 is soon too little to share


def worker_count(requested: int, num_envs: int) -> int:
    """Workers to use: those requested, or one per core left to this process; never more than environments."""
    return min(requested or _own_cores(), num_envs)


def update_threads(requested: int) -> int:
    """Threads of an update: those requested, or one per core left to this process, within reason."""
    return requested or min(_own_cores(), _MOST_THREADS)


def _own_cores() -> int:
    """Usable cores, shared evenly among the processes on this machine that `LOCAL_WORLD_SIZE` counts."""
    return max(1, _usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _usable_cores() -> int:
    """Cores that this process may use; in a container whose time is limited, as many as that time is worth."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(cores, _quota(_CGROUP))))


def _quota(cgroup: Path) -> float:
    """Cores' worth of time that the control group allows, infinite without a limit: threads beyond it only wait."""
    try:
        if (limits := cgroup / "cpu.max").exists():
            quota, period = limits.read_text().split()
        else:  # version 1
            quota, period = (
                (cgroup / "cpu" / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period")
            )
        return float(quota) / float(period) if quota not in ("max", "-1") else math.inf
    except (OSError, ValueError):
        return math.inf
