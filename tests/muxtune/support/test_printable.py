"""Users' texts in messages: short, on one line, harmless for a terminal."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxtune.support.printable import one_line, printable, short_repr


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, ümläut, 文", "plain, ümläut, 文"),
        ("a\x1b[31mb", r"a\x1b[31mb"),
        ("\x07\x00\x7f\x9b", r"\x07\x00\x7f\x9b"),
        ("\u202egnp.exe", r"\u202egnp.exe"),
        ("\udcff", r"\udcff"),
        ("a\nb\tc\rd", r"a\nb\tc\rd"),
    ],
)
def test_control_characters_are_escaped(text, shown):
    assert printable(text) == shown


@given(st.text())
def test_nothing_that_moves_the_cursor_is_left(text):
    for shown in (printable(text), one_line(text), short_repr(text)):
        assert not any(unicodedata.category(c) in {"Cc", "Cf", "Cs", "Zl", "Zp"} for c in shown)
    assert printable(text, lines=True).count("\n") == text.count("\n")


def test_white_space_becomes_single_spaces():
    assert one_line("  a\n\n  b\tc ") == "a b c"


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner)
)


@given(VALUES)
def test_a_short_value_is_shown_as_python_writes_it(value):
    whole = repr(value)
    shown = short_repr(value)
    assert shown == (whole if len(whole) <= 120 else whole[:117] + "...")


def test_no_more_is_looked_at_than_is_shown():
    bomb: list[object] = ["x"] * 9
    for _ in range(60):
        bomb = [bomb] * 9
    assert short_repr(bomb).endswith("...")
    assert len(short_repr({"k" * 10**6: bomb})) == 120
    assert short_repr(10**5000) == "an integer of 16610 bits"

    class Broken:
        def __repr__(self) -> str:
            raise RuntimeError("no")

    assert short_repr(Broken()) == "<Broken>"
