"""Text that fits a terminal: rows of tables are not wrapped, and what is left out is said."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from muxtune.support.tables import format_table, parse_table

_LEAST_CELL = 16
"""Characters that a shortened text keeps, its dots included."""


def fit_text(text: str, columns: int) -> str:
    """A text whose tables are at most ``columns`` characters wide.

    Long texts in cells are shortened first; then columns are left out, from the right. Lines that are of no
    table stay as they are.
    """
    blocks = [
        (is_table, list(lines))
        for is_table, lines in groupby(text.split("\n"), key=lambda line: line.startswith("|"))
    ]
    return "\n".join(
        _fit_table(lines, columns) if is_table else "\n".join(lines) for is_table, lines in blocks
    )


def _fit_table(lines: list[str], columns: int) -> str:
    if len(lines[0]) <= columns:
        return "\n".join(lines)
    header, *rows = parse_table(lines)
    header, rows = _shorten(header, rows, columns)
    left_out: list[str] = []
    while len(header) > 1 and _width(header, rows) > columns:
        left_out.insert(0, header[-1])
        header, rows = header[:-1], [row[:-1] for row in rows]
    table = format_table(header, rows)
    if not left_out:
        return table
    return f"{table}\n(--wide also shows {', '.join(left_out)})"


def _shorten(
    header: Sequence[str], rows: Sequence[Sequence[str]], columns: int
) -> tuple[list[str], list[list[str]]]:
    """Cells of the widest column of texts are cut until the table fits, or none is left to cut."""
    cells = [list(row) for row in rows]
    excess = _width(header, cells) - columns
    while excess > 0:
        widths = [max((len(row[i]) for row in cells), default=0) for i in range(len(header))]
        widest = max(range(len(header)), key=widths.__getitem__)
        width = max(_LEAST_CELL, len(header[widest]), widths[widest] - excess)
        if width >= widths[widest]:
            break
        for row in cells:
            if len(row[widest]) > width:
                row[widest] = row[widest][: width - 3] + "..."
        excess = _width(header, cells) - columns
    return list(header), cells


def _width(header: Sequence[str], rows: Sequence[Sequence[str]]) -> int:
    return sum(max(len(row[i]) for row in [header, *rows]) + 3 for i in range(len(header))) + 1
