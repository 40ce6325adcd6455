"""Whole numbers may be written with an exponent, and nothing else with a point is one."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxtune.support.numbers import number_with_exponent


@pytest.mark.parametrize(
    ("text", "value"),
    [("80e9", 80_000_000_000), ("1.5e9", 1_500_000_000), ("-2E+3", -2000), ("1e0", 1), ("10e-1", 1)],
)
def test_a_whole_value_with_an_exponent_is_a_whole_number(text, value):
    assert number_with_exponent(text) == value
    assert type(number_with_exponent(text)) is int


@pytest.mark.parametrize("text", ["6.0", "1e-5", "1.5", "1e19", "1e400", "1.23e1"])
def test_any_other_stays_a_number_with_a_fraction(text):
    assert type(number_with_exponent(text)) is float
    assert number_with_exponent(text) == float(text)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_no_value_changes(value):
    assert number_with_exponent(repr(value)) == value
    assert math.copysign(1, number_with_exponent(f"{value:e}")) == math.copysign(1, value) or value == 0
