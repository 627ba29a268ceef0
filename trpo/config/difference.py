"""What differs between two configs, how much of a task that makes another, and what has no effect beside the rest."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from trpo.config.schedule import options_at
from trpo.config.settings import Config, EnvConfig
from trpo.config.strict_yaml import show

_ABSENT = object()
_OF_EPISODES = {"id", "kwargs", "wrappers"}  # settings of an environment

_WITHOUT_WORKERS = ("gymnasium", "torch")
_UNSUPERVISED = (*_WITHOUT_WORKERS, "auto", "mujoco", "envpool")
_GIVEN = object()  # any value but null
# Settings, or sections of them, that do nothing where another setting has one of these values.
_IDLE: tuple[tuple[str, str, tuple[object, ...]], ...] = (
    ("env.workers", "env.backend", _WITHOUT_WORKERS),
    ("env.timeout_s", "env.backend", _UNSUPERVISED),
    ("env.on_worker_failure", "env.backend", _UNSUPERVISED),
    ("env.max_restarts", "env.backend", _UNSUPERVISED),
    ("env.max_restarts", "env.on_worker_failure", ("fail",)),
    *(
        (f"{network}.{layers}", f"{network}.body", (_GIVEN,))
        for network in ("policy", "value")
        for layers in ("hidden_sizes", "activation")
    ),
    ("value.adam", "value.fit", ("gauss_newton",)),
    ("value.gauss_newton", "value.fit", ("adam",)),
    ("normalize.clip_observations", "normalize.observations", (False,)),
    ("normalize.clip_rewards", "normalize.rewards", (False,)),
    ("natural_gradient.line_search", "natural_gradient.line_search.enabled", (False,)),
    ("evaluation.episodes", "evaluation.every_steps", (0,)),
)


def config_difference(saved: Config, given: Config) -> list[str]:
    """One line for each setting that differs, as `natural_gradient.max_kl: 0.01 → 0.02`, in the order of the config."""
    return [f"{key}: {_shown(old)} → {_shown(new)}" for key, old, new in _differences(_plain(saved), _plain(given))]


def same_episodes(saved: Config, given: Config) -> bool:
    """Whether the same actions come to the same in both."""
    one, other = (config.env.model_dump(mode="json", include=_OF_EPISODES) for config in (saved, given))
    return one == other


def same_evaluations(saved: Config, given: Config) -> bool:
    """Whether evaluations of the same policy return the same in both."""

    def settings(config: Config) -> tuple[dict[str, Any], int]:
        env = config.env.for_evaluation
        env = env.model_copy(update={"options": options_at(env.options, 1.0)})
        return env.model_dump(mode="json", include={*_OF_EPISODES, "options"}), config.evaluation.max_episode_steps

    return settings(saved) == settings(given)


def without_effect(config: Config) -> list[str]:
    """One line for each setting that departs from its default and changes nothing, with the other that is the cause.

    As `value.adam.epochs, while value.fit is "gauss_newton"`, in the order of the config. What is only of other kinds
    of actions than the environment's is not meant: a recipe may be for many tasks.
    """
    settings = _plain(config)
    lines = []
    for key, _, _ in _differences(_plain(Config(env=EnvConfig(id=config.env.id))), settings):
        for idle, other, values in _IDLE:
            below = key == idle or key.startswith(f"{idle}.")
            if not below or key == other:
                continue
            value = _at(settings, other)
            if value in values or (_GIVEN in values and value is not None):
                lines.append(f"{key}, while {other} is {'given' if _GIVEN in values else show(value)}")
                break
    return lines


def _plain(config: Config) -> dict[str, Any]:
    return config.model_dump(mode="json", by_alias=True)


def _at(settings: dict[str, Any], key: str) -> Any:
    value: Any = settings
    for part in key.split("."):
        value = value[part]
    return value


def _differences(saved: Any, given: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Key path, value there and value here of all that differs."""
    if isinstance(saved, dict) and isinstance(given, dict):
        prefix = f"{key}." if key else ""
        for name in {**saved, **given}:
            yield from _differences(saved.get(name, _ABSENT), given.get(name, _ABSENT), f"{prefix}{name}")
    elif saved != given or type(saved) is not type(given):
        yield key, saved, given


def _shown(value: Any) -> str:
    return "(not set)" if value is _ABSENT else json.dumps(value, ensure_ascii=False, default=str)
