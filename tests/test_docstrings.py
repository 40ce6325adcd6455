"""Descriptions begin with what they describe: no fragment that only its neighbours explain."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("muxtune", "sim", "profiler", "runtime", "experiments", "benchmarks")

FRAGMENT = re.compile(r"(Of|Likewise|The same)\b|(Whose|Which|What|Where|Given|Checked)\W*$")
"""``Of the device.``, ``Likewise.``, ``The same.``, ``Whose.``"""

_SECTION = re.compile(r"( *)(?:Args|Attributes|Returns|Yields|Raises):$")
_NAMED = re.compile(r"(?:Args|Attributes|Raises):$")
_ENTRY = re.compile(r"[\w*., ]+?: +(.*)$")


def descriptions(source: str) -> Iterator[tuple[int, str]]:
    """Line and first line of every docstring, attributes' included, and of every entry of its sections."""
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else []:
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                text = statement.value.value
                if isinstance(text, str):
                    lines = text.splitlines()
                    yield statement.lineno, lines[0]
                    yield from ((statement.lineno + at, entry) for at, entry in _entries(lines))


def _entries(lines: list[str]) -> Iterator[tuple[int, str]]:
    outer, indent, named = -1, None, False
    for at, line in enumerate(lines):
        depth = len(line) - len(line.lstrip())
        if section := _SECTION.match(line):
            outer, indent, named = len(section[1]), None, bool(_NAMED.match(line.strip()))
        elif outer < 0 or not line.strip():
            continue
        elif depth <= outer:
            outer = -1
        elif indent is None or (named and depth == indent):
            indent = depth
            entry = _ENTRY.match(line.strip()) if named else None
            yield at, entry[1] if entry else line.strip()


@pytest.mark.parametrize("room", ROOMS)
def test_no_description_is_a_fragment(room):
    found, fragments = 0, []
    for path in sorted((ROOT / room).rglob("*.py")):
        for line, text in descriptions(path.read_text()):
            found += 1
            if FRAGMENT.match(text):
                fragments.append(f"{path.relative_to(ROOT)}:{line}: {text}")
    assert found > 50, "descriptions are read at all"
    assert not fragments, "begin with the noun or the verb:\n" + "\n".join(fragments)


SAMPLE = '''
"""Of the module."""

LIMIT = 3
"""Likewise."""


class Box:
    """A box.

    Args:
        device: Of the device.
        owner: Whose.
        size: Bytes of the box, which may be
            of the same kind.
    """

    width: int
    """Offset of the box."""

    def turned(self):
        """The same, turned.

        Returns:
            Of one box.

        Raises:
            ValueError: Which.
        """
'''


def test_fragments_are_seen_wherever_they_stand():
    seen = [text for _, text in descriptions(SAMPLE) if FRAGMENT.match(text)]
    expected = {
        "Of the module.",
        "Likewise.",
        "Of the device.",
        "Whose.",
        "The same, turned.",
        "Of one box.",
        "Which.",
    }
    assert set(seen) == expected
    assert (
        len(list(descriptions(SAMPLE))) == len(expected) + 3
    )  # and what is none: a box, its size, its width
    lines = SAMPLE.splitlines()
    assert all(text in lines[line - 1] for line, text in descriptions(SAMPLE))
