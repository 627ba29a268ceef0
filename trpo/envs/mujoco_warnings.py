"""MuJoCo's warnings, each once.

MuJoCo repeats what it finds deprecated in a model for every environment that is made of it: hundreds of times in a run
of HalfCheetah, in the middle of the live display, and into a MUJOCO_LOG.TXT in the working directory.
"""

from __future__ import annotations

import importlib
import sys

import gymnasium
from gymnasium.envs.registration import EnvSpec


def warn_once(env_id: str) -> None:
    """Before `env_id` is made: where it may use MuJoCo, whose warnings nobody handles, prints each on stderr once."""
    if "mujoco" not in sys.modules and not _of_gymnasiums_mujoco(gymnasium.registry.get(env_id)):
        return  # do not import what is perhaps not needed
    try:
        mujoco = importlib.import_module("mujoco")
    except ImportError:
        return  # making the environment says it better
    if mujoco.get_mju_user_warning() is None:
        said: set[str] = set()

        def say(text: str) -> None:
            if text not in said:
                said.add(text)
                print(f"MuJoCo: {text}", file=sys.stderr)

        mujoco.set_mju_user_warning(say)


def _of_gymnasiums_mujoco(spec: EnvSpec | None) -> bool:
    return spec is not None and ".mujoco" in str(spec.entry_point)
