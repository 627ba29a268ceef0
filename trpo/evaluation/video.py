"""Episode → video: frames of one environment in an mp4 file, with or without a screen; or a window, with one."""

from __future__ import annotations

import ctypes.util
import importlib
import os
import sys
import warnings
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import gymnasium
import numpy as np

from trpo.config import EnvConfig
from trpo.config.schedule import options_at
from trpo.envs import make_single_env
from trpo.errors import UserError


class VideoError(UserError):
    """No video can be made here, or not of this environment."""


class VideoWriter:
    """Writes the frames of one environment to an mp4 file, at the environment's own frame rate.

    The file appears when all of it is written. Without a path, does nothing.
    """

    def __init__(self, path: Path | None, env: gymnasium.Env[Any, Any]):
        self.path = path
        self.env = env

    def __enter__(self) -> Self:
        if self.path is None:
            return self
        if self.path.suffix != ".mp4":
            raise VideoError(f"{self.path}: a video file has to end in .mp4")
        self._partial = self.path.with_name(f".{self.path.stem}.partial-{os.getpid()}.mp4")
        import imageio.v2 as imageio

        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._partial.touch()  # ffmpeg, a process of its own, would only break off
            fps = self.env.metadata.get("render_fps", 30)
            self._writer = imageio.get_writer(self._partial, format="FFMPEG", fps=fps, macro_block_size=2)
        except OSError as error:
            raise VideoError(f"cannot write {self.path}: {error.strerror or error}") from error
        return self

    def capture(self) -> None:
        """Renders and appends one frame."""
        if self.path is None:
            return
        frame = _frame(self.env)
        try:
            self._writer.append_data(frame)
        except OSError as error:
            raise VideoError(f"cannot write {self.path}: {str(error).splitlines()[0]}") from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.path is None:
            return
        self._writer.close()
        if error is None:
            os.replace(self._partial, self.path)
        else:
            self._partial.unlink(missing_ok=True)


def check_recordable(env_config: EnvConfig) -> None:
    """Raises `VideoError` if an environment has no frames to record, or packages are missing.

    Call before other environments are made: chooses off-screen rendering where there is no screen.
    """
    render_headless()
    try:
        for package in ("imageio.v2", "imageio_ffmpeg"):
            importlib.import_module(package)
    except ImportError as error:
        raise VideoError(f"videos need a package that is missing ({error}): pip install 'trpo[video]'") from error
    if not _has_mode(env_config, "rgb_array"):
        raise VideoError(f"{env_config.id} has no rgb_array among its render modes; it cannot be recorded")


def check_showable(env_config: EnvConfig) -> None:
    """Raises `UserError` if there is no screen to show an environment on, or it has no window of its own."""
    if not _screen():
        raise UserError("there is no screen to show the environment on; record a video instead, with --video FILE")
    if not _has_mode(env_config, "human"):
        raise UserError(f"{env_config.id} has no render mode `human`: it cannot be shown in a window")


def try_recording(env_config: EnvConfig) -> None:
    """Raises `VideoError` unless an environment can be recorded here: `check_recordable`, and a first frame."""
    check_recordable(env_config)
    with closing(make_single_env(env_config, render_mode="rgb_array")) as env:
        try:
            env.reset(seed=0, options=options_at(env_config.options, 1.0) or None)
        except Exception as error:
            raise VideoError(f"{env_config.id} raised {type(error).__name__} in its reset: {error}") from error
        _frame(env)


def _frame(env: gymnasium.Env[Any, Any]) -> np.ndarray[Any, Any]:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="glfw")  # says line by line what the error below says in one
            frame: Any = env.render()
    except Exception as error:  # rendering back ends raise errors of many kinds
        raise VideoError(
            f"the environment cannot be rendered here ({type(error).__name__}: {error}); on a machine without a "
            "screen MuJoCo needs an off-screen library: apt-get install libegl1, or libosmesa6 with "
            "MUJOCO_GL=osmesa"
        ) from error
    if not isinstance(frame, np.ndarray):
        raise VideoError(f"the environment rendered a {type(frame).__name__}, not an array; it cannot be recorded")
    return frame


def render_headless() -> None:
    """Chooses off-screen rendering where there is no screen. Call before environments are made.

    MuJoCo's import fails if it is told to use a library that is missing, so only what is there is chosen: EGL, which
    uses a GPU if it can, else OSMesa. What the user has set stays.
    """
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")  # it would be printed amid the output of scripts
    if _screen():
        return
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    for library, backend in (("EGL", "egl"), ("OSMesa", "osmesa")):
        if ctypes.util.find_library(library):
            os.environ.setdefault("MUJOCO_GL", backend)
            return


def _has_mode(env_config: EnvConfig, mode: str) -> bool:
    # Of an environment without a `render_mode`: constructors that know none raise errors of their own.
    with closing(make_single_env(env_config)) as env:
        return mode in (env.metadata.get("render_modes") or ())


def _screen() -> bool:
    return sys.platform != "linux" or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
