"""How a result shows itself: its text as it is printed, and in a notebook with tables."""

from __future__ import annotations

from abc import ABC, abstractmethod
from html import escape
from itertools import groupby
from typing import TYPE_CHECKING

from muxtune.support.tables import parse_table

if TYPE_CHECKING:
    import pandas as pd


class Shown(ABC):
    """A result with a text for people and a frame for pandas."""

    @property
    @abstractmethod
    def text(self) -> str:
        """What the command of the same name prints."""

    @abstractmethod
    def to_frame(self) -> pd.DataFrame:
        """The result's rows."""

    def __str__(self) -> str:
        """The text."""
        return self.text

    def _repr_html_(self) -> str:
        return html_of(self.text)


def html_of(text: str) -> str:
    """Paragraphs and Markdown tables, as they are printed, in HTML.

    Args:
        text: Lines; those that begin with ``|`` are of aligned tables, see
            :func:`muxtune.support.tables.format_table`.
    """
    blocks = [list(lines) for _, lines in groupby(text.splitlines(), key=_kind)]
    return "".join(_table(block) if block[0].startswith("|") else _paragraph(block) for block in blocks)


def _kind(line: str) -> str:
    return "table" if line.startswith("|") else "text"


def _paragraph(lines: list[str]) -> str:
    return f"<p>{'<br>'.join(map(escape, lines))}</p>"


def _table(lines: list[str]) -> str:
    header, *rows = parse_table(lines)
    sides = [
        "right" if mark.endswith(":") else "left" for mark in parse_table([lines[0], lines[1], lines[1]])[1]
    ]

    def row(cells: list[str], tag: str) -> str:
        shown = (
            f'<{tag} style="text-align:{side}">{escape(cell)}</{tag}>'
            for cell, side in zip(cells, sides, strict=True)
        )
        return f"<tr>{''.join(shown)}</tr>"

    body = "".join(row(cells, "td") for cells in rows)
    return f"<table><thead>{row(header, 'th')}</thead><tbody>{body}</tbody></table>"
