"""Which settings of a policy that somebody else has made name code to import."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trpo.config import EnvConfig
from trpo.errors import CheckpointError


class UntrustedCodeError(CheckpointError):
    """A saved policy names code to import, which nobody has allowed."""

    def __init__(self, path: Path, named: str, call: str):
        super().__init__(
            f"{path}: its {named} may make Python import code that the policy names; if you trust its origin, allow "
            f"that with --trust-code (in Python: {call})"
        )


HARMLESS = "trpo.envs.wrappers:MaskFromInfo"  # ours, whatever its arguments are


def named_code(env: EnvConfig) -> str | None:
    """The first setting that names code, or that an environment could take as the name of some; None without one."""
    return next(_settings_that_name_code(env), None)


def _settings_that_name_code(env: EnvConfig) -> Iterator[str]:
    if ":" in env.id:
        yield f"env.id {env.id!r}"
    for wrapper in env.wrappers:
        if wrapper.name != HARMLESS:
            yield f"env.wrappers ({wrapper.name!r})"
    for key, given in (("kwargs", env.kwargs), ("options", env.options)):
        for text in _texts(given):
            if ":" in text:  # some environments are built around another, whose id their arguments give
                yield f"env.{key} (which hold {text[:60]!r})"


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _texts(key)
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)
