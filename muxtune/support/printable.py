"""Users' texts and values in messages and tables: on one line, short, and without control characters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

SHOWN_CHARACTERS = 120
"""Characters of a value in a message, at most."""

_CUT = "..."
_SHOWN_BITS = 400
"""Bits of an integer whose digits are shown, at most; Python refuses to write those of thousands of digits at
all."""


def printable(text: str, *, lines: bool = False) -> str:
    r"""``text`` with everything escaped that does not print: ``\x1b``, ``\u202e``, ``\udcff``.

    Names and keys of users' files could otherwise move the cursor of a terminal, colour what follows, or turn
    its direction.

    Args:
        text: Any text.
        lines: Keep line breaks.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or (lines and c == "\n") else _escaped(c) for c in text)


def one_line(text: str) -> str:
    """``text`` with line breaks and other white space as single spaces, and printable."""
    return printable(" ".join(text.split()))


def short_repr(value: object, room: int = SHOWN_CHARACTERS) -> str:
    """``repr`` of a value, cut to ``room`` characters; no more of the value than that is looked at.

    A YAML file of a few lines can describe lists of lists with billions of elements.
    """
    text = "".join(_pieces(value, room))
    return text if len(text) <= room else text[: room - len(_CUT)] + _CUT


def _pieces(value: object, room: int) -> Iterable[str]:
    """Pieces of the text, until there are ``room`` characters."""
    if isinstance(value, str | bytes):
        return [repr(value[: room + 1])]
    if isinstance(value, int) and value.bit_length() > _SHOWN_BITS:
        return [f"an integer of {value.bit_length()} bits"]
    if type(value) in {list, tuple, set, frozenset}:
        assert isinstance(value, list | tuple | set | frozenset)
        first, last = {list: ("[", "]"), tuple: ("(", ")")}.get(type(value), ("{", "}"))
        comma = "," if type(value) is tuple and len(value) == 1 else ""
        return [first, *_joined(([each] for each in value), room), comma, last]
    if type(value) is dict:
        assert isinstance(value, Mapping)
        return ["{", *_joined(([key, each] for key, each in value.items()), room), "}"]
    try:
        return [repr(value)]
    except Exception:  # an object of somebody else
        return [f"<{type(value).__name__}>"]


def _joined(entries: Iterable[list[object]], room: int) -> list[str]:
    """Entries with commas between them; key and value of a mapping with a colon."""
    pieces: list[str] = []
    used = 0
    for entry in entries:
        if used > room:
            break
        parts = ["".join(_pieces(each, room - used)) for each in entry]
        pieces.append((", " if pieces else "") + ": ".join(parts))
        used += len(pieces[-1])
    return pieces


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
