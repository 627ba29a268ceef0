"""One Gymnasium environment from its settings: found, built, wrapped, checked, with flat observations."""

from __future__ import annotations

import difflib
import logging
import re
import traceback
from typing import Any

import gymnasium
from gymnasium.error import DependencyNotInstalled, UnregisteredEnv
from gymnasium.spaces import Space
from gymnasium.vector import VectorEnv

from trpo.config import EnvConfig, WrapperConfig
from trpo.envs.mujoco_process import set_up_mujoco
from trpo.envs.returned import Flattened, ReturnError
from trpo.envs.spaces import ActionEncoding, check_observation_space, is_flat
from trpo.errors import EnvError, did_you_mean, imported, raised

_log = logging.getLogger(__name__)


def make_single_env(config: EnvConfig, *, render_mode: str | None = None) -> gymnasium.Env[Any, Any]:
    """Builds `config.id` with its kwargs and wrappers; observations that are no flat vector are flattened.

    Args:
        config: `num_envs`, `backend` and the worker settings play no part here.
        render_mode: As in `gymnasium.make`; overrides the one in `config.kwargs`.

    Raises:
        EnvError: Unknown id (with near matches), missing package, failing constructor or wrapper, unsupported space.
    """
    env = _make(config, render_mode)
    for index, wrapper in enumerate(config.wrappers):
        env = _wrap(env, wrapper, f"env.wrappers[{index}]")
    for what in ("observation_space", "action_space"):
        if not isinstance(getattr(env, what, None), Space):
            raise EnvError(f"{config.id} has no {what}: set self.{what} to one of gymnasium.spaces in its __init__")
    ActionEncoding.of(env.action_space, config.id)
    check_observation_space(env.observation_space, config.id)
    return env if is_flat(env.observation_space) else Flattened(env)


def close_env(env: gymnasium.Env[Any, Any] | VectorEnv[Any, Any, Any]) -> None:
    """Closes it; what it raises then is a warning, since all that it was for is done."""
    try:
        env.close()
    except (Exception, SystemExit) as error:
        _log.warning("warning: an environment was not closed: it raised %s", raised(error))


def failure(where: str, error: BaseException) -> EnvError:
    """What went wrong with an environment, `where` it did."""
    if isinstance(error, ReturnError):
        return EnvError(f"{where} {error}")
    return EnvError(f"{where} raised {_told(error)}")


def _told(error: BaseException) -> str:
    """What an environment raised, and where."""
    text, line = raised(error), str(traceback.extract_tb(error.__traceback__)[-1].line)
    if "unpack" in str(error) and ("env.reset(" in line or "env.step(" in line):
        text += (
            ": reset() has to return (observation, info), and step() (observation, reward, terminated, truncated, info)"
        )
    return text


def _make(config: EnvConfig, render_mode: str | None) -> gymnasium.Env[Any, Any]:
    # Our own checks (see EnvShard) raise where Gymnasium's passive checker only warns, and cost less.
    kwargs = {**config.kwargs, "disable_env_checker": True}
    if render_mode is not None:
        kwargs["render_mode"] = render_mode
    set_up_mujoco(config.id)
    try:
        return gymnasium.make(config.id, **kwargs)
    except UnregisteredEnv as error:
        raise EnvError(_unknown_id(config.id, error)) from error
    except DependencyNotInstalled as error:
        raise EnvError(_missing_package(config.id, error)) from error
    except (Exception, SystemExit) as error:  # of modules and constructors that give up with `sys.exit`
        raise EnvError(_failure(config, error)) from error


def _unknown_id(env_id: str, error: Exception) -> str:
    module, colon, name = env_id.rpartition(":")
    newest = {_without_version(known): known for known in gymnasium.registry}  # versions are registered in order
    near = [newest[found] for found in difflib.get_close_matches(_without_version(name), newest, n=3)]
    if colon:
        return f"env.id: the module {module!r} registers no environment {name!r}{did_you_mean(near)}"
    hint = did_you_mean(near) or f"; if a package registers it, write `module:{name}` ({error})"
    return f"env.id: no environment {env_id!r} is registered{hint}"


def _without_version(env_id: str) -> str:
    return re.sub(r"-v\d+$", "", env_id)  # which would make any two alike


def _missing_package(env_id: str, error: Exception) -> str:
    spec = gymnasium.registry.get(env_id.rpartition(":")[2])
    entry_point = str(spec.entry_point) if spec is not None else ""
    for extra in ("mujoco", "box2d"):
        if f".{extra}." in entry_point or f".{extra}:" in entry_point:
            return f"{env_id} needs a package that is not installed: pip install 'trpo[{extra}]' ({error})"
    return f"{env_id} needs a package that is not installed: {error}"


def _failure(config: EnvConfig, error: BaseException) -> str:
    module, colon, _ = config.id.partition(":")
    if colon and isinstance(error, ImportError):
        return f"env.id: the module {module!r} of {config.id!r} cannot be imported: {error}"
    return f"{config.id} cannot be built with env.kwargs {config.kwargs}: {_told(error)}"


def _wrap(env: gymnasium.Env[Any, Any], wrapper: WrapperConfig, key: str) -> gymnasium.Env[Any, Any]:
    factory = imported(wrapper.name, key=f"{key}.name", kind=EnvError)
    try:
        wrapped = factory(env, **wrapper.kwargs)
    except (Exception, SystemExit) as error:
        raise EnvError(f"{key}: {wrapper.name} cannot be built with kwargs {wrapper.kwargs}: {_told(error)}") from error
    if not isinstance(wrapped, gymnasium.Env):
        raise EnvError(f"{key}.name: {wrapper.name} gave a {type(wrapped).__name__}, not a gymnasium.Env")
    return wrapped
