"""Tables and quantities for people; the same text reads well in a terminal and as Markdown."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from muxtune.support.printable import printable

_BYTE_UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
_QUANTITY = "0123456789+-"  # what one begins with


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An aligned Markdown table: texts to the left, columns of quantities to the right.

    Args:
        header: Titles of the columns.
        rows: Cells, as many per row as titles; control characters in them are escaped.
    """
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    right = [bool(rows) and all(_is_quantity(row[i]) for row in rows) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        columns = zip(cells, widths, right, strict=True)
        return "| " + " | ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in columns) + " |"

    rule = ["-" * (width - 1) + ":" if r else "-" * width for width, r in zip(widths, right, strict=True)]
    return "\n".join([line(header), line(rule), *map(line, rows)])


def parse_table(lines: Sequence[str]) -> list[list[str]]:
    """Cells of a table of :func:`format_table`: of the header, and of each row.

    The line below the header says where columns end, as a cell may hold a bar, too.
    """
    header, rule, *rows = lines
    bars = [place for place, character in enumerate(rule) if character == "|"]
    return [[line[start + 1 : stop].strip() for start, stop in pairwise(bars)] for line in [header, *rows]]


def _is_quantity(cell: str) -> bool:
    return cell[:1] in _QUANTITY and ":" not in cell  # "3: name" is a text


def show_seconds(seconds: float) -> str:
    """``1.23 s``, ``45.6 ms`` or ``789 us``."""
    if seconds >= 1:
        return f"{seconds:.2f} s"
    if seconds >= 1e-3:  # noqa: PLR2004  # a millisecond
        return f"{seconds * 1e3:.1f} ms"
    return f"{seconds * 1e6:.0f} us"


def show_bytes(bytes_: float) -> str:
    """``44.0 GiB``, ``1.5 MiB``, ``2.0 KiB`` or ``12 bytes``."""
    return _in_unit(bytes_, lambda amount: amount)


def show_bytes_up(bytes_: int) -> str:
    """:func:`show_bytes`, rounded up: of what is needed, so that as much is enough."""
    return _in_unit(bytes_, lambda amount: math.ceil(10 * amount) / 10)


def show_bytes_down(bytes_: int) -> str:
    """:func:`show_bytes`, rounded down: of what there is."""
    return _in_unit(bytes_, lambda amount: math.floor(10 * amount) / 10)


def _in_unit(bytes_: float, rounded: Callable[[float], float]) -> str:
    for size, unit in _BYTE_UNITS:
        if bytes_ >= size:
            return f"{rounded(bytes_ / size):.1f} {unit}"
    return f"{bytes_:.0f} bytes"


@dataclass(frozen=True, slots=True, repr=False)
class Quantity:
    """A quantity as people read it, for messages that would show its number."""

    text: str

    def __repr__(self) -> str:
        """The text, without quotes."""
        return self.text


def show_rate(tokens_per_s: float) -> str:
    """Whole tokens per second."""
    return f"{tokens_per_s:,.0f}"


def show_percent(share: float) -> str:
    """``12.3 %``."""
    return f"{share * 100:.1f} %"


def show_difference(value: float, reference: float) -> str:
    """Difference of a value to a reference as text, ``+12.3 %``."""
    return f"{(value / reference - 1) * 100:+.1f} %"
