from __future__ import annotations

import pytest

from muxtune.support.tables import format_table, parse_table
from muxtune.support.terminal import fit_text

HEADER = ["policy", "hTasks", "iteration", "tokens/s", "memory"]
ROWS = [
    ["muxtune", "0: reviews + questions + a great many other tasks", "130.7 ms", "12,345", "44.0 GiB"],
    ["nemo", "1", "98.2 ms", "9,876", "12.1 GiB"],
]


def widest(text):
    return max(len(line) for line in text.splitlines() if line.startswith("|"))


def test_a_table_that_fits_stays_as_it_is():
    text = f"head\n\n{format_table(HEADER, ROWS)}\n\nfoot"
    assert fit_text(text, 200) == text


def test_long_texts_are_shortened_before_columns_go():
    fitted = fit_text(format_table(HEADER, ROWS), 80)
    assert widest(fitted) <= 80
    header, *rows = parse_table(fitted.splitlines())
    assert header == HEADER
    assert rows[0][1].startswith("0: reviews")
    assert rows[0][1].endswith("...")
    assert [row[:1] + row[2:] for row in rows] == [row[:1] + row[2:] for row in ROWS]


@pytest.mark.parametrize("columns", [30, 40, 50])
def test_columns_go_from_the_right_and_are_named(columns):
    fitted = fit_text(f"head\n{format_table(HEADER, ROWS)}", columns)
    assert widest(fitted) <= columns
    lines = fitted.splitlines()
    kept = parse_table([line for line in lines if line.startswith("|")])[0]
    assert kept == HEADER[: len(kept)]
    assert lines[-1] == f"(--wide also shows {', '.join(HEADER[len(kept) :])})"


def test_other_lines_are_left_to_the_terminal():
    line = "a line that is longer than the terminal is wide, as an error may be"
    assert fit_text(line, 20) == line
