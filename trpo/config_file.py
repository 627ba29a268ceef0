"""YAML text and overrides → one `Config`, and back. Every mistake is one line: file:line, key path, what to change.

The YAML read here is a subset whose values mean what they look like (YAML 1.2 core scalars: `1e-3` is a number, `on`
is text) and that can hold nothing but data: no tags, anchors, aliases or merge keys, and no key twice.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import yaml
from pydantic import ValidationError

from trpo.config import Config
from trpo.errors import ConfigError

KeyPath: TypeAlias = tuple[str | int, ...]
Schema: TypeAlias = dict[str, Any]
Origins: TypeAlias = dict[KeyPath, str]  # where each key was given, in the order of the text
Locate: TypeAlias = Callable[[int], str]  # line, from 1 → "file:line"

_MAX_DEPTH = 32  # far above any real file, far below Python's recursion limit
_MAX_DIGITS = 400  # beyond any float, below the length Python refuses to convert
_INT = r"(?:0|[1-9][0-9]*(?:_[0-9]+)*)"
_NOT_FINITE = r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
_SCALARS = {
    "null": r"(?:~|null|Null|NULL|)\Z",
    "bool": r"(?:true|false)\Z",
    "int": rf"[-+]?{_INT}\Z",
    "float": rf"(?:[-+]?(?:{_INT}(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|{_NOT_FINITE})\Z",
}
_BOOL_WORDS = {"true": "true", "yes": "true", "on": "true", "false": "false", "no": "false", "off": "false"}
_OTHER_NOTATION = re.compile(r"[-+]?0[xXoObB]?[0-9a-fA-F_.]{1,30}\Z")
_PLAIN_WORD = re.compile(r"[A-Za-z][\w./-]*(?::[\w./-]+)*\Z", re.ASCII)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file of departures from the defaults and applies overrides in order, a later one over an earlier.

    Args:
        path: a UTF-8 file.
        overrides: `key.path=value`, the value in the file's own syntax: `natural_gradient.max_kl=0.02`.

    Raises:
        ConfigError: the file cannot be read or a setting is wrong; one line that says which and what to change.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        byte = f"byte 0x{error.object[error.start]:02x} at offset {error.start}"
        raise _error(str(path), (), f"is not UTF-8 text ({byte})") from None
    except FileNotFoundError:
        near = difflib.get_close_matches(str(path), [str(sibling) for sibling in path.parent.glob("*.yaml")], n=1)
        raise _error(str(path), (), f"no such file{_did_you_mean(near)}") from None
    except IsADirectoryError:
        raise _error(str(path), (), "is a directory; name a YAML file") from None
    except (OSError, ValueError) as error:
        raise _error(str(path), (), f"cannot be read: {getattr(error, 'strerror', None) or error}") from None
    return parse_config(text, source=str(path), overrides=overrides)


def parse_config(text: str, *, source: str = "<text>", overrides: Sequence[str] = ()) -> Config:
    """`load_config` for text already in memory; `source` is what errors call it.

    Raises:
        ConfigError: a setting is wrong; one line.
    """
    origins: Origins = {}
    data = _read(text, (), lambda line: f"{source}:{line}", origins)
    if data is None:
        raise _error(source, (), "is empty; at least env.id is needed")
    if not isinstance(data, dict):
        raise _error(origins[()], (), f"must be a mapping of settings, not {_show(data)}")
    origins[()] = source  # what is wrong with the whole has no line
    for override in overrides:
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
    data = _plain(config.model_dump(by_alias=True), ())
    return str(yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1 << 20))


def settings_table() -> str:
    """All settings as a Markdown table: key path, type and range, default, meaning."""
    rows = ["| Setting | Type and range | Default | Meaning |", "|---|---|---|---|"]
    for path, schema, required in _walk(_schema(), ()):
        if "properties" not in schema:
            default = schema.get("default", {})
            default = "required" if required else f"`{default if isinstance(default, str) else _show(default)}`"
            cells = (f"`{_dotted(path)}`", _describe(schema), default, schema.get("description", ""))
            rows.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


# Text → data. PyYAML scans and composes nodes; what they mean is decided here, so nothing can be constructed but data.


class _Loader(yaml.SafeLoader):
    """Composes plain scalars, sequences and mappings, to a bounded depth, and refuses the rest where it stands."""

    def __init__(self, text: str, base: KeyPath, locate: Locate) -> None:
        super().__init__(text)
        self._locate = locate
        self._trail: list[str | int | None] = list(base)  # None: the root, or a key being read

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        part = index.value if isinstance(index, yaml.ScalarNode) else index
        self._trail.append(part if isinstance(part, str | int) else None)
        if len(self._trail) > _MAX_DEPTH:
            self._refuse(event, f"nested more than {_MAX_DEPTH} levels deep")
        if event.anchor is not None:
            self._refuse(event, "anchors (&) and aliases (*) are not allowed; write the value out")
        if event.tag is not None:
            self._refuse(event, f"tags ({_clip(event.tag)}) are not allowed; write a plain value")
        node = super().compose_node(parent, index)
        self._trail.pop()
        return node

    def _refuse(self, event: Any, problem: str) -> None:
        path = tuple(part for part in self._trail if part is not None)
        raise _error(self._locate(event.start_mark.line + 1), path[:8], problem)


_Loader.yaml_implicit_resolvers = {}  # its own: the inherited rules are YAML 1.1
for _kind, _pattern in _SCALARS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(_pattern), None)


def _read(text: str, base: KeyPath, locate: Locate, origins: Origins) -> Any:
    """One YAML document as plain data; `origins` gains the place of everything at and below `base`."""
    try:
        node = _Loader(text, base, locate).get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = f"is not valid YAML: {', '.join(filter(None, (error.context, error.problem)))}"
        problem += "; indent with spaces" if "'\\t'" in problem else ""
        raise _error(locate(mark.line + 1 if mark else 1), base, problem) from None
    except yaml.reader.ReaderError as error:
        character = f"U+{ord(text[error.position]):04X}"
        line = text.count("\n", 0, error.position) + 1
        raise _error(locate(line), base, f"is not valid YAML: character {character} is not allowed") from None
    except (ValueError, OverflowError) as error:  # PyYAML converts escapes and version numbers unchecked
        raise _error(locate(1), base, f"is not valid YAML: {_clip(str(error))}") from None
    if node is None:
        return None
    origins[base] = locate(node.start_mark.line + 1)
    return _construct(node, base, locate, origins)


def _construct(node: yaml.Node, path: KeyPath, locate: Locate, origins: Origins) -> Any:
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node, path, origins[path])
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            origins[*path, index] = locate(item.start_mark.line + 1)
        return [_construct(item, (*path, index), locate, origins) for index, item in enumerate(node.value)]
    data: dict[str, Any] = {}
    first_line: dict[str, int] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        key = _key(key_node, path, locate(line))
        if key in data:
            raise _error(locate(line), (*path, key), f"given twice; the first is on line {first_line[key]}")
        first_line[key] = line
        origins[*path, key] = locate(line)
        data[key] = _construct(value_node, (*path, key), locate, origins)
    return data


def _key(node: yaml.Node, path: KeyPath, place: str) -> str:
    if not isinstance(node, yaml.ScalarNode):
        raise _error(place, path, "a key must be text, not a list or a mapping")
    if node.value == "<<" and node.style is None:
        raise _error(place, path, "merge keys (<<) are not allowed; write the values out")
    if not node.tag.endswith(":str"):
        raise _error(place, path, f"a key must be text; quote it: {_show(node.value)}")
    return str(node.value)


def _scalar(node: yaml.ScalarNode, path: KeyPath, place: str) -> Any:
    text, kind = node.value, node.tag.rpartition(":")[2]
    if kind == "null":
        return None
    if kind == "bool":
        return text == "true"
    if kind in ("int", "float") and len(text) > _MAX_DIGITS:
        raise _error(place, path, f"a number of {len(text)} digits is too long")
    if kind == "int":
        return int(text)
    if kind == "float":
        number = float(re.sub(r"\.(?=[a-zA-Z])", "", text))
        if math.isinf(number) and not text.lower().endswith("inf"):
            raise _error(place, path, f"{_clip(text)} is too large for a number")
        return number
    if node.style is None:
        if text.lower() == "none":
            raise _error(place, path, f"{text} is text in YAML: write null, or {_show(text)} for the text")
        # A typed setting refuses the text by its type; where any type goes, it would pass unnoticed.
        if _at(path) == {} and (meant := _meant(text)):
            raise _error(place, path, f"{text} is text in YAML: write {meant}, or {_show(text)} for the text")
    return text


def _meant(text: str) -> str | None:
    """The boolean or number that other YAML readers see in what is text here (`on`, `0x10`, `010`), else None."""
    if word := _BOOL_WORDS.get(text.lower()):
        return word
    if _OTHER_NOTATION.match(text):
        for parse in (lambda digits: int(digits, 0), int, float):
            try:
                return str(parse(text))
            except ValueError:
                continue
    return None


# Overrides: the same reader, one key path at a time.


def _override(data: dict[str, Any], override: str, origins: Origins) -> None:
    label = f"override {_clip(override)}"
    dotted, equals, text = override.partition("=")
    path: KeyPath = tuple(dotted.strip().split("."))
    if not equals:
        raise _error(label, (), "write it as key.path=value")
    prefixes = [path[:depth] for depth in range(1, min(len(path), _MAX_DEPTH))]
    for prefix in prefixes:
        if "items" in (_at(prefix) or {}):
            raise _error(label, prefix, "is a list: give the whole of it")
    if len(path) > _MAX_DEPTH or _at(path) is None:
        raise _error(label, path, _unknown(path))
    for prefix in prefixes:
        origins.setdefault(prefix, label)
    origins[path] = label
    _set(data, path, _read(text, path, lambda _: label, origins))


def _set(data: dict[Any, Any], path: KeyPath, value: Any) -> None:
    if isinstance(value, dict) and "properties" in (_at(path) or {}):
        for key, inner in value.items():
            _set(data, (*path, key), inner)
        return
    for depth, part in enumerate(path[:-1], start=1):
        below = data.get(part)
        if not isinstance(below, dict):
            if part in data and "properties" in (_at(path[:depth]) or {}):
                return  # a section given as something else is reported, not papered over
            below = data[part] = {}
        data = below
    data[path[-1]] = value


# Errors.


def _error(place: str, path: KeyPath, problem: str) -> ConfigError:
    parts = (place, _dotted(path), problem) if path else (place, problem)
    return ConfigError(" ".join(": ".join(parts).split()))


def _first_problem(error: ValidationError, origins: Origins) -> ConfigError:
    """The first problem in the order of the text; what is missing comes last, being often misspelt further up."""
    order = {path: position for position, path in enumerate(origins)}
    problems = sorted(
        ((_key_path(problem["loc"]), problem) for problem in error.errors(include_url=False)),
        key=lambda item: (item[1]["type"] == "missing", order[_nearest(item[0], origins)]),
    )
    path, problem = problems[0]
    place = origins[_nearest(path, origins)]
    if problem["type"] == "contradiction":
        context, section = problem["ctx"], path
        path, other = ((*section, *context[role].split(".")) for role in ("key", "against"))
        place = origins[path if path in origins else _nearest(other, origins)]  # the other, where the key is a default
        text = context["problem"]
    elif problem["type"] == "missing":
        path = _required(path)
        text = f"is required: {_describe(_at(path) or {})}"
    elif problem["type"] == "extra_forbidden":
        text = _unknown(path)
    else:
        text = _unfit(_at(path) or {}, problem["input"])
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return _error(place, path, text + more)


def _unknown(path: KeyPath) -> str:
    return f"unknown setting{_did_you_mean(_suggestions(path))}"


def _unfit(schema: Schema, value: Any) -> str:
    if "properties" in schema:
        return f"is a section ({', '.join(schema['properties'])}), not {_show(value)}"
    types = {branch.get("type") for branch in schema.get("oneOf", [schema])}
    return f"must be {_describe(schema)}, not {_show(value)}{_hint(schema, types, value)}"


def _hint(schema: Schema, types: set[Any], value: Any) -> str:
    if value is None:
        return "; leave it out for the default"
    if "integer" in types and isinstance(value, float) and value.is_integer():
        return f"; write {int(value)}"
    if not isinstance(value, str):
        return f'; quote it: "{value}"' if "string" in types and isinstance(value, int | float) else ""
    if "enum" in schema:
        return _did_you_mean(difflib.get_close_matches(_clip(value), schema["enum"], n=1))
    meant = _meant(value)
    if types & {"integer", "number"}:
        if any(re.match(_SCALARS[kind], value) for kind in ("int", "float")):
            return "; remove the quotes"
        return f"; write {meant}" if meant and meant not in _BOOL_WORDS else ""
    return f"; write {meant}" if meant in _BOOL_WORDS and "boolean" in types else ""


def _suggestions(path: KeyPath) -> list[str]:
    """Settings of the same name elsewhere; else the nearest name beside it, the nearest path, the nearest name."""
    by_name: dict[str, list[str]] = {}
    for candidate, _, _ in _walk(_schema(), ()):
        if not any(isinstance(part, int) for part in candidate):
            by_name.setdefault(str(candidate[-1]), []).append(_dotted(candidate))
    name = _clip(str(path[-1]))
    if name in by_name:
        return by_name[name]
    beside = _mapping(_at(path[:-1]) or {}).get("properties", {})
    if near := difflib.get_close_matches(name, beside, n=1, cutoff=0.65):
        return [_dotted((*path[:-1], near[0]))]
    if near := difflib.get_close_matches(_dotted(path), [known for paths in by_name.values() for known in paths], n=1):
        return near
    return [known for near_name in difflib.get_close_matches(name, by_name, n=1) for known in by_name[near_name]]


def _did_you_mean(candidates: list[str]) -> str:
    return f"; did you mean {' or '.join(candidates)}?" if candidates else ""


def _nearest(path: KeyPath, origins: Origins) -> KeyPath:
    while path not in origins:
        path = path[:-1]
    return path


def _dotted(path: KeyPath) -> str:
    text = "".join(
        f"[{part}]" if isinstance(part, int) else "." + (part if re.fullmatch(r"[\w-]{1,60}", part) else _show(part))
        for part in path
    )
    return _clip(text.removeprefix("."), 120)


def _show(value: Any) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return str(yaml.safe_dump(value)).split()[0]
    text = json.dumps(value, ensure_ascii=False)
    return _clip(text if text.isprintable() else json.dumps(value))


def _clip(text: str, length: int = 60) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."


# The settings as a JSON schema: the same names, ranges and meanings that pydantic enforces.


@cache
def _schema() -> Schema:
    root = Config.model_json_schema()
    inlined: Schema = _inline(root, root["$defs"])
    return inlined


def _inline(schema: Any, definitions: Schema) -> Any:
    if isinstance(schema, list):
        return [_inline(item, definitions) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        schema = definitions[schema["$ref"].rpartition("/")[2]] | {k: v for k, v in schema.items() if k != "$ref"}
    return {key: _inline(value, definitions) for key, value in schema.items()}


def _mapping(schema: Schema) -> Schema:
    """Of a choice, the branch that is a mapping; anything else as it is."""
    return next((branch for branch in schema.get("oneOf", ()) if "properties" in branch), schema)


def _at(path: KeyPath) -> Schema | None:
    """The schema of a setting or section; {} inside a free-form mapping, None for an unknown path."""
    schema = _schema()
    for part in path:
        schema = _mapping(schema)
        free = schema == {} or schema.get("additionalProperties") is True
        below = {} if free else schema.get("items") if isinstance(part, int) else schema.get("properties", {}).get(part)
        if below is None:
            return None
        schema = below
    return schema


def _key_path(loc: tuple[int | str, ...]) -> KeyPath:
    """A pydantic location without the names it gives to the branches of a choice."""
    path: KeyPath = ()
    for part in loc:
        chosen = "oneOf" in (_at(path) or {}) and part in ("number", "schedule")
        path = path if chosen else (*path, part)
    return path


def _required(path: KeyPath) -> KeyPath:
    schema = _at(path) or {}
    return _required((*path, schema["required"][0])) if schema.get("required") else path


def _walk(schema: Schema, path: KeyPath) -> Iterator[tuple[KeyPath, Schema, bool]]:
    """Every section and setting in order, with whether it is required."""
    for name, below in schema.get("properties", {}).items():
        yield (*path, name), below, name in schema.get("required", ())
        yield from _walk(_mapping(below), (*path, name))
        yield from _walk(below.get("items", {}), (*path, name, 0))


def _describe(schema: Schema) -> str:
    """What a value must be, in words that fit after "must be"."""
    if "oneOf" in schema:
        return " or ".join(_describe(branch) for branch in schema["oneOf"])
    if "enum" in schema:
        return f"one of {', '.join(schema['enum'])}"
    match schema.get("type"):
        case "integer":
            return f"an integer{_range(schema)}"
        case "number":
            return f"a number{_range(schema)}"
        case "boolean":
            return "true or false"
        case "array":
            return f"a list, each {_describe(schema['items'])}"
        case "object":
            return f"a mapping {{{', '.join(schema['properties'])}}}" if "properties" in schema else "a mapping"
        case _:
            return str(schema.get("form", "text that is not empty" if schema.get("minLength") else "text"))


def _range(schema: Schema) -> str:
    low = schema.get("minimum", schema.get("exclusiveMinimum"))
    high = schema.get("maximum", schema.get("exclusiveMaximum"))
    if high is None:
        return "" if low is None else f" {'≥' if 'minimum' in schema else '>'} {low}"
    return f" in {'[' if 'minimum' in schema else '('}{low}, {high}{']' if 'maximum' in schema else ')'}"


# Data → text.


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_str(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    plain = _PLAIN_WORD.match(text) and text.lower() not in {*_BOOL_WORDS, "none", "null"}
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else '"')


def _represent_list(dumper: _Dumper, items: list[Any]) -> yaml.SequenceNode:
    flat = not any(isinstance(item, dict | list) for item in items)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=flat)


def _represent_dict(dumper: _Dumper, items: dict[str, Any]) -> yaml.MappingNode:
    return dumper.represent_mapping("tag:yaml.org,2002:map", items.items(), flow_style=not items)


_Dumper.add_representer(str, _represent_str)
_Dumper.add_representer(list, _represent_list)
_Dumper.add_representer(dict, _represent_dict)


def _plain(value: Any, path: KeyPath) -> Any:
    """Tuples as lists; anything but numbers, text, lists and mappings refused."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item, (*path, index)) for index, item in enumerate(value)]
    if isinstance(value, dict) and all(type(key) is str for key in value):
        return {key: _plain(item, (*path, key)) for key, item in value.items()}
    raise _error("config", path, f"a value of type {type(value).__name__} cannot be written as YAML")
