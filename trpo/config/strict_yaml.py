"""The YAML of config files, a subset whose values mean what they look like and that holds nothing but data.

Scalars are those of the YAML 1.2 core schema: `1e-3` is a number, `on` is text. No tags, anchors, aliases or merge
keys, and no key twice. PyYAML cuts the text into events; what they mean is decided here, so that nothing can be
constructed but numbers, text, lists and mappings. Every error is one line: place, key path, what to change.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, TypeAlias

import yaml

from trpo.errors import ConfigError

KeyPath: TypeAlias = tuple[str | int, ...]
Origins: TypeAlias = dict[KeyPath, str]  # where each key was given, in the order of the text
Locate: TypeAlias = Callable[[int], str]  # line, from 1 → "file:line"

MAX_DEPTH = 32  # far above any real file, far below Python's recursion limit
BOOLEAN_WORDS = {"true": "true", "yes": "true", "on": "true", "false": "false", "no": "false", "off": "false"}

_MAX_DIGITS = 400  # beyond any float, below the length Python refuses to convert
_INTEGER = r"(?:0|[1-9][0-9]*(?:_[0-9]+)*)"
_SCALARS = {
    "null": re.compile(r"~|null|Null|NULL|"),
    "bool": re.compile(r"true|false"),
    "int": re.compile(rf"[-+]?{_INTEGER}"),
    "float": re.compile(rf"[-+]?(?:{_INTEGER}(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"),
    "not finite": re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"),
}
_OTHER_NOTATION = re.compile(r"[-+]?0[xXoObB]?[0-9a-fA-F_.]{1,30}")
_PLAIN_WORD = re.compile(r"[A-Za-z][\w./-]*(?::[\w./-]+)*", re.ASCII)


def read_yaml(
    text: str, *, locate: Locate, untyped: Callable[[KeyPath], bool], base: KeyPath = ()
) -> tuple[Any, Origins]:
    """One YAML document as plain data, and the place of everything at and below `base`.

    Args:
        text: the document; None is read from an empty one.
        locate: names a line of the text in errors and origins.
        untyped: whether a value at a key path may be of any type. There, plain text that other YAML readers take for a
            boolean or number is refused, since no type would notice it later.
        base: key path of the document's root.

    Raises:
        ConfigError: not YAML, or not of this subset; one line.
    """
    events = _events(text, base, locate)
    if not events:
        return None, {}
    reader = _Reader(events, locate, untyped)
    reader.origins[base] = locate(_line(events[0]))
    return reader.value(base), reader.origins


def write_yaml(data: Any, *, source: str) -> str:
    """Plain data (tuples as lists) as YAML that `read_yaml` reads back to equal data.

    Raises:
        ConfigError: `data` holds something else; the line begins with `source` and names its key path.
    """
    plain = _plain(data, (), source)
    return str(yaml.dump(plain, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1 << 20))


def is_number(text: str) -> bool:
    """Whether plain text would be read as a finite number."""
    return _kind(text) in ("int", "float")


def meant(text: str) -> str | None:
    """The boolean or number that other YAML readers see in what is text here (`on`, `0x10`, `00.5`), else None."""
    if word := BOOLEAN_WORDS.get(text.lower()):
        return word
    if _OTHER_NOTATION.fullmatch(text):
        for base in (0, 10):  # 0: as the prefix says
            with suppress(ValueError):
                return str(int(text, base))
        with suppress(ValueError):
            return show(float(text))
    return None


def config_error(place: str, path: KeyPath, problem: str) -> ConfigError:
    """The one line of an error: `place: key.path: problem`."""
    parts = (place, dotted(path), problem) if path else (place, problem)
    return ConfigError(" ".join(": ".join(parts).split()))


def dotted(path: KeyPath) -> str:
    """A key path as text: `env.wrappers[0].name`; keys that are no plain names in quotes."""
    text = "".join(
        f"[{part}]" if isinstance(part, int) else "." + (part if re.fullmatch(r"[\w-]{1,60}", part) else show(part))
        for part in path
    )
    return clip(text.removeprefix("."), 120)


def show(value: Any) -> str:
    """A value as it would be written, shortened, on one line."""
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value).replace("inf", ".inf").replace("nan", ".nan")
    text = json.dumps(value, ensure_ascii=False)
    return clip(text if text.isprintable() else json.dumps(value))


def clip(text: str, length: int = 60) -> str:
    """Text of at most `length` characters, the cut marked by dots."""
    return text if len(text) <= length else text[: length - 3] + "..."


def _events(text: str, base: KeyPath, locate: Locate) -> list[Any]:
    """The events of the only document, nested no deeper than `MAX_DEPTH`; none for an empty text."""
    try:
        return _one_document(yaml.parse(text, Loader=yaml.SafeLoader), base, locate)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = f"is not valid YAML: {', '.join(filter(None, (error.context, error.problem)))}"
        problem += "; indent with spaces" if "'\\t'" in problem else ""
        raise config_error(locate(mark.line + 1 if mark else 1), base, problem) from None
    except yaml.reader.ReaderError as error:
        character = f"U+{ord(text[error.position]):04X}"
        line = text.count("\n", 0, error.position) + 1
        raise config_error(locate(line), base, f"is not valid YAML: character {character} is not allowed") from None
    except (ValueError, OverflowError) as error:  # PyYAML converts escapes and version numbers unchecked
        raise config_error(locate(1), base, f"is not valid YAML: {clip(str(error))}") from None


def _one_document(stream: Iterable[Any], base: KeyPath, locate: Locate) -> list[Any]:
    events: list[Any] = []
    depth = 0
    for event in stream:
        if isinstance(event, yaml.DocumentStartEvent) and events:
            problem = "is not valid YAML: expected a single document in the stream, but found another document"
            raise config_error(locate(_line(event)), base, problem)
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > MAX_DEPTH:
            raise config_error(locate(_line(event)), base, f"nested more than {MAX_DEPTH} levels deep")
        if isinstance(event, yaml.NodeEvent | yaml.CollectionEndEvent):
            events.append(event)
    return events


def _line(event: Any) -> int:
    return int(event.start_mark.line) + 1


class _Reader:
    """Turns the events of a document into data, in the order of the text, noting where each key was given."""

    def __init__(self, events: Iterable[Any], locate: Locate, untyped: Callable[[KeyPath], bool]) -> None:
        self._events = iter(events)
        self._locate = locate
        self._untyped = untyped
        self.origins: Origins = {}

    def value(self, path: KeyPath) -> Any:
        """The next value, all of it."""
        return self._value(next(self._events), path)

    def _value(self, event: Any, path: KeyPath) -> Any:
        self._refuse_references(event, path)
        if isinstance(event, yaml.ScalarEvent):
            return self._scalar(event, path)
        return self._list(path) if isinstance(event, yaml.SequenceStartEvent) else self._mapping(path)

    def _list(self, path: KeyPath) -> list[Any]:
        items: list[Any] = []
        while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
            below = (*path, len(items))
            self.origins[below] = self._place(event)
            items.append(self._value(event, below))
        return items

    def _mapping(self, path: KeyPath) -> dict[str, Any]:
        data: dict[str, Any] = {}
        lines: dict[str, int] = {}
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            key = self._key(event, path)
            below = (*path, key)
            if key in data:
                raise config_error(self._place(event), below, f"given twice; the first is on line {lines[key]}")
            lines[key] = _line(event)
            self.origins[below] = self._place(event)
            data[key] = self.value(below)
        return data

    def _key(self, event: Any, path: KeyPath) -> str:
        self._refuse_references(event, path)
        place = self._place(event)
        if not isinstance(event, yaml.ScalarEvent):
            raise config_error(place, path, "a key must be text, not a list or a mapping")
        if event.style is None and event.value == "<<":
            raise config_error(place, path, "merge keys (<<) are not allowed; write the values out")
        if event.style is None and _kind(event.value) != "text":
            raise config_error(place, path, f"a key must be text; quote it: {show(event.value)}")
        return str(event.value)

    def _scalar(self, event: Any, path: KeyPath) -> Any:
        if event.style is not None:  # quoted or a block: text, whatever it looks like
            return event.value
        # A value's own line may be below that of its key, which is where readers look for it.
        return _plain_scalar(event.value, path, self.origins[path], untyped=self._untyped(path))

    def _refuse_references(self, event: Any, path: KeyPath) -> None:
        if event.anchor is not None:
            problem = "anchors (&) and aliases (*) are not allowed; write the value out"
            raise config_error(self._place(event), path, problem)
        if event.tag is not None:
            problem = f"tags ({clip(event.tag)}) are not allowed; write a plain value"
            raise config_error(self._place(event), path, problem)

    def _place(self, event: Any) -> str:
        return self._locate(_line(event))


def _kind(text: str) -> str:
    """What plain text is in the core schema: a key of `_SCALARS`, or `text`."""
    return next((kind for kind, pattern in _SCALARS.items() if pattern.fullmatch(text)), "text")


def _plain_scalar(text: str, path: KeyPath, place: str, *, untyped: bool) -> Any:
    kind = _kind(text)
    if kind in ("int", "float") and len(text) > _MAX_DIGITS:
        raise config_error(place, path, f"a number of {len(text)} digits is too long")
    match kind:
        case "null":
            return None
        case "bool":
            return text == "true"
        case "int":
            return int(text)
        case "not finite":
            return float(text.replace(".", ""))
        case "float":
            number = float(text)
            if math.isinf(number):
                raise config_error(place, path, f"{clip(text)} is too large for a number")
            return number
    if text.lower() == "none":
        raise config_error(place, path, f"{text} is text in YAML: write null, or {show(text)} for the text")
    if untyped and (other := meant(text)):
        raise config_error(place, path, f"{text} is text in YAML: write {other}, or {show(text)} for the text")
    return text


def _plain(value: Any, path: KeyPath, source: str) -> Any:
    """Tuples as lists; anything but numbers, text, lists and mappings refused."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item, (*path, index), source) for index, item in enumerate(value)]
    if isinstance(value, dict) and all(type(key) is str for key in value):
        return {key: _plain(item, (*path, key), source) for key, item in value.items()}
    raise config_error(source, path, f"a value of type {type(value).__name__} cannot be written as YAML")


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_str(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    plain = _PLAIN_WORD.fullmatch(text) and text.lower() not in {*BOOLEAN_WORDS, "none", "null"}
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else '"')


def _represent_list(dumper: _Dumper, items: list[Any]) -> yaml.SequenceNode:
    flat = not any(isinstance(item, dict | list) for item in items)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=flat)


def _represent_dict(dumper: _Dumper, items: dict[str, Any]) -> yaml.MappingNode:
    return dumper.represent_mapping("tag:yaml.org,2002:map", items.items(), flow_style=not items)


_Dumper.add_representer(str, _represent_str)
_Dumper.add_representer(list, _represent_list)
_Dumper.add_representer(dict, _represent_dict)
