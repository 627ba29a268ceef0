"""MuJoCo's warnings, each once.

MuJoCo repeats what it finds deprecated in a model for every environment that is made of it: hundreds of times in a run
of HalfCheetah, in the middle of the live display, and into a MUJOCO_LOG.TXT in the working directory.
"""

from __future__ import annotations

import importlib
import re
import sys

import gymnasium


def warn_once(env_id: str) -> None:
    """Before `env_id` is made: where it may use MuJoCo, prints each kind of warning on stderr once a process.

    Not where somebody else handles them, nor of an environment that nothing shows to use MuJoCo.
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


def _of_gymnasiums_mujoco(env_id: str) -> bool:
    """With or without the module to import and the version."""
    name = env_id.rpartition(":")[2]
    return any(
        ".mujoco" in str(spec.entry_point)
        for known, spec in gymnasium.registry.items()
        if known == name or known.startswith(f"{name}-v")
    )
