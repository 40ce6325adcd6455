"""YAML that users write: every key once, numbers as people write them, and small files stay small.

Plain values mean what the core schema of YAML 1.2 says (and ``<<`` merges). ``true`` and ``false`` alone are
booleans, so a task may be called ``NO``; ``80e9`` is a number; ``1:30``, ``1_000`` and dates are texts. One
rule is stricter: ``010`` is a text too, as it is 8 to some readers and 10 to others.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import yaml

from muxtune.support.errors import UserError
from muxtune.support.numbers import number_with_exponent
from muxtune.support.printable import short_repr
from muxtune.support.user_files import read_user_bytes

MOST_MIB = 16
"""Largest YAML file that is read, in MiB."""

MOST_DEPTH = 64
"""Levels of lists and mappings inside each other."""

MOST_VALUES = 1_000_000
"""Values of a file whose aliases are written out."""

_NULL = re.compile(r"(~|null|Null|NULL|)\Z")
_BOOLEAN = re.compile(r"(true|True|TRUE|false|False|FALSE)\Z")
_INTEGER = re.compile(r"([-+]?(0|[1-9][0-9]*)|0o[0-7]+|0x[0-9a-fA-F]+)\Z")
_DECIMAL = re.compile(r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?\Z")
_NOT_FINITE = re.compile(r"([-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))\Z")
_KEY_CHARACTERS = 64
_MERGE = "tag:yaml.org,2002:merge"


def load_yaml(path: Path, what: str) -> object:
    """Content of a user's YAML file.

    Args:
        path: The file.
        what: Name of the content in messages: ``the workload``.

    Raises:
        UserError: It cannot be read, is not YAML, has a key twice in one mapping, or describes too much.
    """
    content = read_user_bytes(path, what, most_mib=MOST_MIB)
    try:
        loader = _Loader(content.decode(), str(path))
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        reason = ", ".join(filter(None, [error.context, error.problem]))
        raise UserError(f"{path} is not YAML: {_line(error.problem_mark)}{reason}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error


class _Loader(yaml.SafeLoader):
    """Safe loader that refuses before anything is built."""

    yaml_implicit_resolvers = {}  # noqa: RUF012  # of this class; not those of YAML 1.1

    def __init__(self, text: str, where: str) -> None:
        super().__init__(text)
        self._where = where
        self._depth = 0
        self._values: dict[yaml.Node, int] = {}
        """Number of nodes in each finished node, itself included, with aliases written out."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node:
        """Refuse a node that is too deep or too much."""
        mark, is_alias = self.get_mark(), self.check_event(yaml.AliasEvent)
        self._depth += 1
        if self._depth > MOST_DEPTH:
            self._refuse(mark, f"more than {MOST_DEPTH} levels of lists and mappings in each other")
        node = super().compose_node(parent, index)
        assert node is not None, "an event begins a node"
        self._depth -= 1
        if is_alias and node not in self._values:
            self._refuse(mark, "a value that contains itself")
        values = self._values.setdefault(node, 1 + sum(self._values[child] for child in _children(node)))
        if values > MOST_VALUES:
            self._refuse(mark, f"more than {MOST_VALUES:,} values, with aliases written out")
        return node

    def compose_mapping_node(self, anchor: dict[Any, yaml.Node]) -> yaml.MappingNode:
        """Refuse a key that stands twice."""
        node = super().compose_mapping_node(anchor)
        first: dict[Hashable, int] = {}
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue  # no key that anything of ours has; the constructor refuses it
            key = _MERGE if key_node.tag == _MERGE else self.construct_object(key_node)
            line = key_node.start_mark.line + 1
            if not isinstance(key, Hashable):
                continue
            if key in first:
                shown = key_node.value[:_KEY_CHARACTERS]
                reason = f"the key {shown} stands in one mapping twice, first in line {first[key]}"
                self._refuse(key_node.start_mark, f"{reason}: expected every key once")
            first[key] = line
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> object:
        """Name the line of what has no value: ``2026-13-01``, or an integer of thousands of digits."""
        try:
            return super().construct_object(node, deep=deep)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            kind = node.tag.rsplit(":", 1)[-1]
            self._refuse(node.start_mark, f"{short_repr(node.value)}: expected a value of type {kind}")

    def _refuse(self, mark: yaml.Mark, reason: str) -> NoReturn:
        raise UserError(f"{self._where}: {_line(mark)}{reason}")


def _boolean(loader: _Loader, node: yaml.ScalarNode) -> bool:
    return _matched(_BOOLEAN, node).lower() == "true"


def _integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    return int(_matched(_INTEGER, node), base=0)


def _number(loader: _Loader, node: yaml.ScalarNode) -> int | float:
    if _NOT_FINITE.match(node.value):
        return float(node.value.replace(".", ""))
    return number_with_exponent(_matched(_DECIMAL, node))


def _matched(pattern: re.Pattern[str], node: yaml.ScalarNode) -> str:
    """The text of a value, which has its form even where a tag (``!!int``) says what it is."""
    if not pattern.match(node.value):
        raise ValueError(node.value)
    text: str = node.value
    return text


_NUMERIC = list("-+.0123456789")
for _kind, _pattern, _begin in (
    ("null", _NULL, ["~", "n", "N", ""]),
    ("bool", _BOOLEAN, list("tTfF")),
    ("int", _INTEGER, _NUMERIC),
    ("float", _DECIMAL, _NUMERIC),
    ("float", _NOT_FINITE, _NUMERIC),
    ("merge", re.compile(r"<<\Z"), ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", _pattern, _begin)
for _kind, _construct in (("bool", _boolean), ("int", _integer), ("float", _number)):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _construct)


def _children(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.SequenceNode):
        yield from node.value
    elif isinstance(node, yaml.MappingNode):
        for pair in node.value:
            yield from pair


def _line(mark: yaml.Mark | None) -> str:
    return "" if mark is None else f"line {mark.line + 1}: "
