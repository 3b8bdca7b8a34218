"""YAML read as kubectl reads it, with the line of every field.

kubectl turns YAML into JSON with go-yaml v2: `1e-4` is a number, `on` a boolean, `017` is 15 and a date is a string.
PyYAML parses; only what a plain scalar means is decided here (go-yaml's `resolve.go`). One difference, on purpose: kubectl
keeps the last of two equal keys in silence, here they are refused.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import yaml

Path = tuple[str | int, ...]
MAX_NODES = 100_000

_TAG = "tag:yaml.org,2002:"
_WORDS: dict[str, Any] = {
    **dict.fromkeys(("y", "Y", "yes", "Yes", "YES", "true", "True", "TRUE", "on", "On", "ON"), True),
    **dict.fromkeys(("n", "N", "no", "No", "NO", "false", "False", "FALSE", "off", "Off", "OFF"), False),
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys((".inf", ".Inf", ".INF", "+.inf", "+.Inf", "+.INF"), float("inf")),
    **dict.fromkeys(("-.inf", "-.Inf", "-.INF"), float("-inf")),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
}
_INTEGER = re.compile(r"([-+]?)(?:0[xX]([0-9a-fA-F]+)|0[bB]([01]+)|0[oO]?([0-7]+)|([1-9][0-9]*|0))")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_KINDS = {"int": (int,), "float": (int, float), "bool": (bool,), "null": (type(None),)}


class InvalidYAML(Exception):
    """The text is not what kubectl would accept; the message begins with the line where that is known."""


@dataclass(frozen=True)
class Document:
    """One YAML document: its JSON value and the line, from 1, on which each field's value begins."""

    value: Any
    lines: dict[Path, int]

    def line(self, path: Path) -> int | None:
        """The line of a field, or of the nearest field around it that is written."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path)


def read(text: bytes) -> list[Document]:
    """All documents of a file that are not empty, in order; raises InvalidYAML."""
    try:
        return [_Reader().document(node) for node in yaml.compose_all(text, Loader=_Loader) if not _is_empty(node)]
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        return _read_json(text, error)
    except RecursionError as error:
        raise InvalidYAML("nested too deeply to be a FineTuneJob") from error


def write(values: Iterable[Any]) -> str:
    """JSON values as YAML documents that kubectl reads back equal: what it would take for a number or a boolean is in quotes."""
    documents = (yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=sys.maxsize) for value in values)
    return "---\n".join(documents)


class _Dumper(yaml.SafeDumper):
    """PyYAML quotes what YAML 1.1 reads as something else than text; go-yaml sees more of it (`1e3`)."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    plain = text == "" or isinstance(scalar(text), str)
    return dumper.represent_scalar(f"{_TAG}str", text, style=None if plain else "'")


_Dumper.add_representer(str, _represent_text)


def scalar(text: str) -> Any:
    """What a plain (unquoted) scalar means: None, a bool, an int, a float or the text itself.

    Float overflows and integers beyond 64 bits in a base other than ten stay text, as with go-yaml.
    """
    if text in _WORDS:
        return _WORDS[text]
    if text[0] == ".":
        return _float(text)
    if text[0] not in "+-0123456789":
        return text
    plain = text.replace("_", "")
    integer = _integer(plain)
    number = _float(plain) if integer is None else integer
    return text if isinstance(number, str) else number


def _integer(text: str) -> int | None:
    match = _INTEGER.fullmatch(text)
    if not match:
        return None
    sign, *groups = match.groups()
    digits, base = next((group, base) for group, base in zip(groups, (16, 2, 8, 10), strict=True) if group is not None)
    value = int(digits, base) * (-1 if sign == "-" else 1)
    return value if -(2**63) <= value < 2**64 else None


def _float(text: str) -> float | str:
    if not _FLOAT.fullmatch(text):
        return text
    value = float(text)
    return value if abs(value) != float("inf") else text


class _Loader(yaml.SafeLoader):
    """PyYAML's scanner, parser and composer; scalars are left to `scalar`, so every plain one gets the tag `!plain`."""

    def resolve(self, kind: type[yaml.Node], value: Any, implicit: Any) -> str:
        if kind is yaml.ScalarNode and implicit[0]:
            return f"{_TAG}merge" if value == "<<" else "!plain"
        return str(super().resolve(kind, value, implicit))  # type: ignore[no-untyped-call]


def _is_empty(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag == "!plain" and scalar(node.value) is None


class _Reader:
    """Turns the nodes of one document into JSON values and notes their lines."""

    def __init__(self) -> None:
        self.lines: dict[Path, int] = {}
        self.count = 0
        self.open: set[int] = set()

    def document(self, node: yaml.Node) -> Document:
        return Document(self.value(node, ()), self.lines)

    def value(self, node: yaml.Node, path: Path) -> Any:
        self.lines.setdefault(path, _line(node))
        self.count += 1
        if self.count > MAX_NODES:
            raise InvalidYAML(f"line {_line(node)}: more than {MAX_NODES:,} values, aliases counted at each use")
        if isinstance(node, yaml.ScalarNode):
            return _json(_scalar_value(node), node)
        if id(node) in self.open:
            raise InvalidYAML(f"line {_line(node)}: an anchor contains itself")
        self.open.add(id(node))
        value = self.mapping(node, path) if isinstance(node, yaml.MappingNode) else [self.value(item, (*path, i)) for i, item in enumerate(node.value)]
        self.open.discard(id(node))
        return value

    def mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        own: dict[str, Any] = {}
        seen: dict[str, int] = {}
        merged: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if key_node.tag == f"{_TAG}merge":
                merged = self.merge(value_node, path)
                continue
            key = _key(key_node)
            if key in seen:
                raise InvalidYAML(f"line {_line(key_node)}: {'.'.join(map(str, (*path, key)))} is written twice (first on line {seen[key]})")
            seen[key] = _line(key_node)
            self.lines[(*path, key)] = _line(key_node)
            own[key] = self.value(value_node, (*path, key))
        return {**merged, **own}

    def merge(self, node: yaml.Node, path: Path) -> dict[str, Any]:
        """The value of `<<`: a mapping, or a list of them of which the first one wins."""
        parts = node.value if isinstance(node, yaml.SequenceNode) else [node]
        merged: dict[str, Any] = {}
        for part in parts:
            value = self.value(part, path)
            if not isinstance(value, dict):
                raise InvalidYAML(f"line {_line(part)}: << takes a mapping or a list of mappings")
            merged = {**value, **merged}
        return merged


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _key(node: yaml.Node) -> str:
    value = _scalar_value(node) if isinstance(node, yaml.ScalarNode) else None
    if value is None:
        raise InvalidYAML(f"line {_line(node)}: a key must be text")
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(_json(value, node))


def _scalar_value(node: yaml.ScalarNode) -> Any:
    """The value of a scalar by its tag: plain, one of YAML's own written out (`!!int`), or text."""
    if node.tag == "!plain":
        return scalar(node.value)
    kind = node.tag.removeprefix(_TAG)
    if kind == "binary":
        return _binary(node)
    if kind not in _KINDS:
        return node.value
    value = scalar(node.value) if node.value else None
    if not isinstance(value, _KINDS[kind]) or (isinstance(value, bool) and kind != "bool"):
        raise InvalidYAML(f"line {_line(node)}: {node.value!r} is not a !!{kind}")
    return value


def _binary(node: yaml.ScalarNode) -> str:
    import base64

    try:
        return base64.b64decode("".join(node.value.split()), validate=True).decode()
    except ValueError as error:
        raise InvalidYAML(f"line {_line(node)}: !!binary is not base64 of UTF-8 text") from error


def _json(value: Any, node: yaml.Node) -> Any:
    """The value after JSON: a whole float is an integer there, and there is no infinity."""
    if not isinstance(value, float):
        return value
    if value != value or abs(value) == float("inf"):
        raise InvalidYAML(f"line {_line(node)}: {node.value} is not a finite number")
    return int(value) if value.is_integer() and abs(value) < 2**63 else value


def _read_json(text: bytes, error: Exception) -> list[Document]:
    """JSON may hold tabs between its tokens, which YAML forbids: kubectl reads both."""
    if text.lstrip().startswith(b"{"):
        try:
            return [Document(json.loads(text, object_pairs_hook=_unique), {})]
        except ValueError:
            pass
    raise InvalidYAML(" ".join(_explain(error))) from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice is not None:
        raise InvalidYAML(f"{twice} is written twice")
    return dict(pairs)


def _explain(error: Exception) -> Iterator[str]:
    mark = getattr(error, "problem_mark", None)
    if mark is not None:
        yield f"line {mark.line + 1}:"
    yield "not valid YAML:"
    yield str(getattr(error, "problem", None) or getattr(error, "reason", None) or error)
    context = getattr(error, "context", None)
    if context:
        yield f"({context})"
