"""Fields of nested plain data by a path in text, as a sweep file names them.

cluster.device.memory_bytes        keys of mappings
workload.tasks[*].peft.r           every element of a list
workload.tasks[0].steps            one element, by position
workload.tasks[sentiment].steps    one element, by its ``id``
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise

from muxtune.support.errors import SpecError

_PART = re.compile(r"\.?([A-Za-z_][A-Za-z0-9_]*)|\[(\*|[A-Za-z0-9][A-Za-z0-9._-]*)\]")


@dataclass(frozen=True, slots=True)
class Selector:
    """``[*]``, ``[0]`` or ``[id]`` behind the name of a list."""

    text: str

    def positions(self, elements: list[object], path: str) -> list[int]:
        """Positions of the elements that it stands for.

        Raises:
            CombinationError: There is none.
        """
        if self.text == "*":
            return list(range(len(elements)))
        named = [i for i, e in enumerate(elements) if isinstance(e, dict) and e.get("id") == self.text]
        if named:
            return named
        if self.text.isdecimal() and int(self.text) < len(elements):
            return [int(self.text)]
        raise CombinationError(path, self.text, f"an id, or a position below {len(elements)}")


class CombinationError(SpecError):
    """Fields that are right by themselves and cannot be together: a point is wrong, not the sweep file."""


Part = str | Selector
"""A key of a mapping, or a choice among the elements of a list."""


def parse_field(path: str) -> tuple[Part, ...]:
    """Parts of a path.

    Raises:
        SpecError: It is not one.
    """
    parts: list[Part] = []
    position = 0
    while position < len(path):
        match = _PART.match(path, position)
        if match is None or (match[0].startswith(".") != bool(parts) and match[1]):
            break
        parts.append(match[1] or Selector(match[2]))
        position = match.end()
    if position < len(path) or not parts or isinstance(parts[0], Selector):
        raise SpecError("field", path, "a path such as workload.tasks[*].peft.r")
    return tuple(parts)


def assign(content: dict[str, object], path: str, parts: tuple[Part, ...], value: object) -> None:
    """Set a field of nested mappings and lists; missing mappings on the way are made.

    Args:
        content: Changed in place.
        path: Path of the field, for messages.
        parts: Parts of the path, from ``content`` on.
        value: What the field gets.

    Raises:
        SpecError: The path leads through something that is no mapping or list.
        CombinationError: It selects an element that the list does not have.
    """
    containers: list[object] = [content]
    for part, following in pairwise(parts):
        empty: type = list if isinstance(following, Selector) else dict
        containers = [inner for outer in containers for inner in _enter(outer, part, empty, path)]
    for container in containers:
        _set(container, parts[-1], value, path)


def _enter(container: object, part: Part, empty: type, path: str) -> list[object]:
    if isinstance(part, Selector):
        elements = _expect_list(container, path)
        return [elements[i] for i in part.positions(elements, path)]
    mapping = _expect_mapping(container, part, path)
    if mapping.get(part) is None:
        mapping[part] = empty()
    return [mapping[part]]


def _set(container: object, part: Part, value: object, path: str) -> None:
    if isinstance(part, Selector):
        elements = _expect_list(container, path)
        for position in part.positions(elements, path):
            elements[position] = value
    else:
        _expect_mapping(container, part, path)[part] = value


def _expect_mapping(container: object, key: str, path: str) -> dict[str, object]:
    if not isinstance(container, dict):
        raise SpecError(path, container, f"a mapping that may have the field {key}")
    return container


def _expect_list(container: object, path: str) -> list[object]:
    if not isinstance(container, list):
        raise SpecError(path, container, "a list to select from")
    return container
