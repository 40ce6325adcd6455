from __future__ import annotations

import pytest

from muxtune.support.tables import (
    format_table,
    show_bytes,
    show_difference,
    show_percent,
    show_rate,
    show_seconds,
)


def test_quantities_stand_right_and_texts_left():
    assert format_table(["name", "n"], [["a", "10"], ["long name", "7"]]) == (
        "| name      |  n |\n| --------- | -: |\n| a         | 10 |\n| long name |  7 |"
    )


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (show_seconds(1.234), "1.23 s"),
        (show_seconds(0.0456), "45.6 ms"),
        (show_seconds(7.89e-4), "789 us"),
        (show_bytes(3 * 2**19), "1.5 MiB"),
        (show_rate(12345.6), "12,346"),
        (show_percent(0.1234), "12.3 %"),
        (show_difference(9, 10), "-10.0 %"),
        (show_difference(11, 10), "+10.0 %"),
    ],
)
def test_quantities(shown, expected):
    assert shown == expected
