"""How a result shows itself: its text as it is printed, and in a notebook with tables."""

from __future__ import annotations

from abc import ABC, abstractmethod
from html import escape
from itertools import groupby, pairwise
from typing import TYPE_CHECKING

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
    rule = lines[1]
    bars = [place for place, character in enumerate(rule) if character == "|"]  # a cell may have one, too
    columns = [
        (start + 1, stop, "right" if rule[stop - 2] == ":" else "left") for start, stop in pairwise(bars)
    ]

    def row(line: str, tag: str) -> str:
        cells = (
            f'<{tag} style="text-align:{side}">{escape(line[start:stop].strip())}</{tag}>'
            for start, stop, side in columns
        )
        return f"<tr>{''.join(cells)}</tr>"

    body = "".join(row(line, "td") for line in lines[2:])
    return f"<table><thead>{row(lines[0], 'th')}</thead><tbody>{body}</tbody></table>"
