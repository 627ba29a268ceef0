"""YAML text and overrides → one `Config`, and back. Every mistake is one line: file:line, key path, what to change."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from trpo.config.schema import (
    Schema,
    branches,
    describe,
    first_required,
    is_list,
    is_section,
    is_untyped,
    key_path,
    schema_at,
    unknown_setting,
    words,
)
from trpo.config.settings import Config
from trpo.config.strict_yaml import (
    BOOLEAN_WORDS,
    MAX_DEPTH,
    KeyPath,
    Origins,
    clip,
    config_error,
    is_number,
    meant,
    read_yaml,
    show,
    write_yaml,
)
from trpo.errors import ConfigError, did_you_mean, nearest_path

__all__ = ["dump_config", "load_config", "parse_config"]


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file of departures from the defaults and applies overrides in order, a later one over an earlier.

    Args:
        path: a UTF-8 file.
        overrides: `key.path=value` each, the value in the file's own syntax: `natural_gradient.max_kl=0.02`.

    Raises:
        ConfigError: the file cannot be read or a setting is wrong; one line that says which and what to change.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        byte = f"byte 0x{error.object[error.start]:02x} at offset {error.start}"
        raise config_error(str(path), (), f"is not UTF-8 text ({byte})") from None
    except FileNotFoundError:
        others = (file for directory in (Path("configs"), path.parent) for file in directory.glob("*.yaml"))
        raise config_error(str(path), (), f"no such file{nearest_path(path, others)}") from None
    except IsADirectoryError:
        raise config_error(str(path), (), "is a directory; name a YAML file") from None
    except (OSError, ValueError) as error:
        raise config_error(str(path), (), f"cannot be read: {getattr(error, 'strerror', None) or error}") from None
    return parse_config(text, source=str(path), overrides=overrides)


def parse_config(text: str, *, source: str = "<text>", overrides: Sequence[str] = ()) -> Config:
    """`load_config` for text already in memory; `source` is what errors call it.

    Raises:
        ConfigError: a setting is wrong; one line.
    """
    data, origins = read_yaml(text, locate=lambda line: f"{source}:{line}", untyped=is_untyped)
    if data is None:
        raise config_error(source, (), "is empty; at least env.id is needed")
    if not isinstance(data, dict):
        raise config_error(origins[()], (), f"must be a mapping of settings, not {show(data)}")
    origins[()] = source  # what is wrong with the whole has no line
    for override in [overrides] if isinstance(overrides, str) else overrides:  # one alone is meant as one
        _override(data, override, origins)
    try:
        return Config.model_validate(data, by_alias=True, by_name=False)
    except ValidationError as error:
        raise _first_problem(error, origins) from None


def dump_config(config: Config) -> str:
    """The resolved settings, all of them, as YAML that `parse_config` reads back to an equal `Config`.

    Raises:
        ConfigError: a free-form argument (`env.kwargs`, a wrapper's `kwargs`) holds what YAML cannot.
    """
    return write_yaml(config.model_dump(by_alias=True), source="config")


def _override(data: dict[str, Any], override: str, origins: Origins) -> None:
    """Applies `key.path=value` to what was read from the file."""
    label = f"override {clip(override)}"
    keys, equals, text = override.partition("=")
    path: KeyPath = tuple(keys.strip().split("."))
    if not equals:
        raise config_error(label, (), "write it as key.path=value")
    parents = [path[:depth] for depth in range(1, min(len(path), MAX_DEPTH))]
    for parent in [*parents, path]:
        bare = (*parent[:-1], str(parent[-1]).partition("[")[0])  # without an index
        if bare != path and is_list(bare):
            raise config_error(label, bare, "is a list: give the whole of it")
    if len(path) > MAX_DEPTH or schema_at(path) is None:
        raise config_error(label, path, unknown_setting(path))
    value, found = read_yaml(text, locate=lambda _: label, untyped=is_untyped, base=path)
    section: Any = data
    for parent in parents:
        section = section.get(parent[-1]) if isinstance(section, dict) else None
        if not isinstance(section, dict) and not (parent in origins and is_section(parent)):
            origins[parent] = label  # made here, or put in the place of a number
    if not (isinstance(value, dict) and is_section(path)):  # nothing is left of what the file has below
        for gone in [known for known in origins if known[: len(path)] == path]:
            del origins[gone]
    origins.update({path: label, **found})
    _set(data, path, value)


def _set(data: dict[Any, Any], path: KeyPath, value: Any) -> None:
    """Puts a value in its place; a mapping given for a section changes only the settings it names."""
    if isinstance(value, dict) and is_section(path):
        for key, inner in value.items():
            _set(data, (*path, key), inner)
        return
    for depth, part in enumerate(path[:-1], start=1):
        below = data.get(part)
        if not isinstance(below, dict):
            if part in data and is_section(path[:depth]):
                return  # a section given as something else is reported, not papered over
            below = data[part] = {} if part in data else _default_schedule(path[:depth], path[depth])
        data = below
    data[path[-1]] = value


def _default_schedule(path: KeyPath, key: str | int) -> dict[str, Any]:
    """The default at `path` if that is a schedule, or the like, with `key`: its other numbers stay. {} otherwise."""
    default: Any = (schema_at(path) or {}).get("default")
    return {**default} if not is_section(path) and isinstance(default, dict) and key in default else {}


def _first_problem(error: ValidationError, origins: Origins) -> ConfigError:
    """The first problem in the order of the text; what is missing comes last, being often misspelt further up."""
    order = {path: position for position, path in enumerate(origins)}
    problems = sorted(
        ((key_path(problem["loc"]), problem) for problem in error.errors(include_url=False)),
        key=lambda item: (item[1]["type"] == "missing", order[_nearest(item[0], origins)]),
    )
    path, problem = problems[0]
    place = origins[_nearest(path, origins)]
    match problem["type"]:
        case "contradiction":
            path, place, text = _contradiction(path, problem["ctx"], origins)
        case "missing":
            path = first_required(path)
            text = f"is required: {describe(schema_at(path) or {})}"
        case "extra_forbidden":
            known = schema_at(path) is not None  # to another branch of the choice that its neighbours made
            text = (
                "belongs to another form of this setting than the keys beside it: keep one form"
                if known
                else unknown_setting(path)
            )
        case _:
            text = _unfit(schema_at(path) or {}, problem["input"])
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return config_error(place, path, text + more)


def _contradiction(section: KeyPath, context: dict[str, Any], origins: Origins) -> tuple[KeyPath, str, str]:
    """Path, place and text of two settings that exclude each other; the place is the other's where one is a default."""
    path, other = ((*section, *context[role].split(".")) for role in ("key", "against"))
    place = origins[path if path in origins else _nearest(other, origins)]
    return path, place, context["problem"]


def _nearest(path: KeyPath, origins: Origins) -> KeyPath:
    """The path itself or the nearest above it that was given."""
    while path not in origins:
        path = path[:-1]
    return path


def _unfit(schema: Schema, value: Any) -> str:
    """What is wrong with a value that a known setting cannot take."""
    if "properties" in schema:
        return f"is a section ({', '.join(schema['properties'])}), not {show(value)}"
    return f"must be {describe(schema)}, not {show(value)}{_hint(schema, value)}"


def _hint(schema: Schema, value: Any) -> str:
    """The likely correction, where the mistake is a common one."""
    types = {branch.get("type") for branch in branches(schema)}
    if value is None:
        return "; leave it out for the default"
    if "integer" in types and isinstance(value, float) and value.is_integer():
        return f"; write {int(value)}"
    known = words(schema)
    if not isinstance(value, str):
        quotable = "string" in types and not known and isinstance(value, int | float)
        return f'; quote it: "{value}"' if quotable else ""
    if known:
        return did_you_mean(difflib.get_close_matches(clip(value), known, n=1))
    numeric = bool(types & {"integer", "number"})
    if numeric and is_number(value):
        return "; remove the quotes"
    correction = meant(value)
    fits = "boolean" in types if correction in BOOLEAN_WORDS else numeric
    return f"; write {correction}" if correction and fits else ""
