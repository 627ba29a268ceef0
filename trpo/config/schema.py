"""The settings as a JSON schema: the same names, ranges and meanings that pydantic enforces, in words for people."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from functools import cache
from typing import Any, TypeAlias

from trpo.config.settings import Config
from trpo.config.strict_yaml import KeyPath, clip, dotted, show
from trpo.errors import did_you_mean

Schema: TypeAlias = dict[str, Any]


def schema_at(path: KeyPath) -> Schema | None:
    """The schema of a setting or section; {} inside a free-form mapping, None for an unknown path."""
    schema = _root()
    for part in path:
        schema = _mapping(schema)
        free = schema == {} or schema.get("additionalProperties") is True
        below = {} if free else schema.get("items") if isinstance(part, int) else schema.get("properties", {}).get(part)
        if below is None:
            return None
        schema = below
    return schema


def is_section(path: KeyPath) -> bool:
    """Whether a path is a mapping of settings, and nothing else."""
    return "properties" in (schema_at(path) or {})


def is_list(path: KeyPath) -> bool:
    return "items" in (schema_at(path) or {})


def is_untyped(path: KeyPath) -> bool:
    """Whether a path lies inside a free-form mapping, where a value may be of any type."""
    return schema_at(path) == {}


def key_path(location: tuple[str | int, ...]) -> KeyPath:
    """A pydantic error's location without the names it gives to the branches of a choice."""
    path: KeyPath = ()
    parts = iter(location)
    for part in parts:
        # What follows a branch's name is a key again, whatever it is called.
        chosen = len(branches(schema_at(path) or {})) > 1 and part in ("number", "schedule", "learned")
        key = next(parts, None) if chosen else part
        path = path if key is None else (*path, key)
    return path


def first_required(path: KeyPath) -> KeyPath:
    """The first setting at or below `path` that has no default, `path` itself if it is no section."""
    while required := (schema_at(path) or {}).get("required"):
        path = (*path, required[0])
    return path


def unknown_setting(path: KeyPath) -> str:
    """What is wrong with a path that is no setting, with the nearest that is one."""
    return f"unknown setting{did_you_mean(_suggestions(path))}"


def branches(schema: Schema) -> list[Schema]:
    """The alternatives of a choice between types, and of choices within it; anything else is the only one."""
    choice = schema.get("oneOf") or schema.get("anyOf")
    return [branch for part in choice for branch in branches(part)] if choice else [schema]


def words(schema: Schema) -> list[str]:
    """The texts a setting takes, where it takes only some."""
    return [word for branch in branches(schema) for word in branch.get("enum", [branch.get("const")]) if word]


def describe(schema: Schema) -> str:
    """What a value must be, in words that fit after "must be"."""
    if len(branches(schema)) > 1:
        return " or ".join(describe(branch) for branch in branches(schema))
    if "enum" in schema:
        return f"one of {', '.join(schema['enum'])}"
    if "const" in schema:
        return str(schema["const"])
    match schema.get("type"):
        case "null":
            return "null"
        case "integer":
            return f"an integer{_range(schema)}"
        case "number":
            return f"a number{_range(schema)}"
        case "boolean":
            return "true or false"
        case "array":
            return f"a list, each {describe(schema['items'])}"
        case "object":
            return f"a mapping {{{', '.join(schema['properties'])}}}" if "properties" in schema else "a mapping"
        case _:
            return str(schema.get("form", "text that is not empty" if schema.get("minLength") else "text"))


def _as_in_a_file(default: Any) -> str:
    """A default as it would be written in YAML."""
    if isinstance(default, dict) and default:
        return "{" + ", ".join(f"{key}: {_as_in_a_file(value)}" for key, value in default.items()) + "}"
    return default if isinstance(default, str) else show(default)


def settings_table() -> str:
    """All settings as a Markdown table: key path, type and range, default, meaning."""
    rows = ["| Setting | Type and range | Default | Meaning |", "|---|---|---|---|"]
    for path, schema, required in _walk(_root(), ()):
        if "properties" not in schema:
            default = schema.get("default", {})
            default = "required" if required else f"`{_as_in_a_file(default)}`"
            cells = (f"`{dotted(path)}`", describe(schema), default, schema.get("description", ""))
            rows.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


@cache
def _root() -> Schema:
    root = Config.model_json_schema()
    inlined: Schema = _inline(root, root["$defs"])
    return inlined


def _inline(schema: Any, definitions: Schema) -> Any:
    """The schema with every reference replaced by what it refers to."""
    if isinstance(schema, list):
        return [_inline(item, definitions) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        schema = definitions[schema["$ref"].rpartition("/")[2]] | {k: v for k, v in schema.items() if k != "$ref"}
    return {key: _inline(value, definitions) for key, value in schema.items()}


def _mapping(schema: Schema) -> Schema:
    """Of a choice, the branches that are mappings, as if they were one; anything else as it is."""
    mappings = [branch for branch in branches(schema) if "properties" in branch]
    if len(mappings) < 2:
        return mappings[0] if mappings else schema
    return {
        "properties": {name: below for branch in mappings for name, below in branch["properties"].items()},
        "required": [name for branch in mappings for name in branch.get("required", ())],
    }


def _walk(schema: Schema, path: KeyPath) -> Iterator[tuple[KeyPath, Schema, bool]]:
    """Every section and setting in order, with whether it is required."""
    for name, below in schema.get("properties", {}).items():
        yield (*path, name), below, name in schema.get("required", ())
        yield from _walk(_mapping(below), (*path, name))
        yield from _walk(below.get("items", {}), (*path, name, 0))


def _range(schema: Schema) -> str:
    low = schema.get("minimum", schema.get("exclusiveMinimum"))
    high = schema.get("maximum", schema.get("exclusiveMaximum"))
    if high is None:
        return "" if low is None else f" {'≥' if 'minimum' in schema else '>'} {low}"
    return f" in {'[' if 'minimum' in schema else '('}{low}, {high}{']' if 'maximum' in schema else ')'}"


def _suggestions(path: KeyPath) -> list[str]:
    """Settings of the same name elsewhere; else the nearest name beside it, the nearest path, the nearest name."""
    by_name: dict[str, list[str]] = {}
    for known, _, _ in _walk(_root(), ()):
        if not any(isinstance(part, int) for part in known):
            by_name.setdefault(str(known[-1]), []).append(dotted(known))
    name = clip(str(path[-1]))
    if name in by_name:
        return by_name[name]
    beside = _mapping(schema_at(path[:-1]) or {}).get("properties", {})
    if near := difflib.get_close_matches(name, beside, n=1, cutoff=0.65):
        return [dotted((*path[:-1], near[0]))]
    every_path = [known for paths in by_name.values() for known in paths]
    if near := difflib.get_close_matches(dotted(path), every_path, n=1):
        return near
    return [known for near_name in difflib.get_close_matches(name, by_name, n=1) for known in by_name[near_name]]
