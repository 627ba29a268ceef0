"""What is set in MuJoCo for all of a process: each of its warnings comes once, and it times nothing.

MuJoCo repeats what it finds deprecated in a model for every environment that is made of it: hundreds of times in a run
of HalfCheetah, in the middle of the live display, and into a MUJOCO_LOG.TXT in the working directory. And its Python
package has it look at the clock before and after each part of a step, for `MjData.timer`: an eighth of what a step of
Hopper takes, or more.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import re
import sys
from typing import Any

import gymnasium


def set_up_mujoco(env_id: str) -> None:
    """Before `env_id` is made: where it may use MuJoCo, prints each kind of warning on stderr once; stops the clock.

    Not where somebody handles the one or gave the other, nor for an environment that nothing shows to use MuJoCo.
    """
    if "mujoco" not in sys.modules and not _of_gymnasiums_mujoco(env_id):
        return  # do not import what is perhaps not needed
    try:
        mujoco = importlib.import_module("mujoco")
    except ImportError:
        return  # making the environment says it better
    if mujoco.get_mju_user_warning() is None:
        said: set[str] = set()

        def say(text: str) -> None:
            kind = re.sub(r"\d+", "", text)  # an unstable simulation names the time
            if kind not in said:
                said.add(kind)
                print(f"MuJoCo: {text}", file=sys.stderr)

        mujoco.set_mju_user_warning(say)
    if mujoco.get_mjcb_time() is None:
        _stop_clock(mujoco)


def _stop_clock(mujoco: Any) -> None:
    """What `mujoco.set_mjcb_time(None)` does not do: that is the package's own clock again."""
    # The package's modules lead to the library's symbols, but not on Windows. Not found, it goes on taking the time.
    for path in (mujoco._callbacks.__file__, os.path.join(os.path.dirname(mujoco.__file__), "mujoco.dll")):
        with contextlib.suppress(OSError, ValueError):
            ctypes.c_void_p.in_dll(ctypes.CDLL(path), "mjcb_time").value = None


def _of_gymnasiums_mujoco(env_id: str) -> bool:
    """With or without the module to import and the version."""
    name = env_id.rpartition(":")[2]
    return any(
        ".mujoco" in str(spec.entry_point)
        for known, spec in gymnasium.registry.items()
        if known == name or known.startswith(f"{name}-v")
    )
