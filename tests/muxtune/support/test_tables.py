from __future__ import annotations

import pytest

from muxtune.support.tables import (
    Quantity,
    format_table,
    parse_table,
    show_bytes,
    show_bytes_down,
    show_bytes_up,
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
        (show_bytes(44 * 2**30), "44.0 GiB"),
        (show_bytes(2**30 - 1), "1024.0 MiB"),
        (show_bytes(3 * 2**19), "1.5 MiB"),
        (show_bytes(2048), "2.0 KiB"),
        (show_bytes(0), "0 bytes"),
        (show_rate(12345.6), "12,346"),
        (show_percent(0.1234), "12.3 %"),
        (show_difference(9, 10), "-10.0 %"),
        (show_difference(11, 10), "+10.0 %"),
    ],
)
def test_quantities(shown, expected):
    assert shown == expected


def test_a_table_is_read_back_bars_and_all():
    rows = [["a | b", "10"], ["", "7"]]
    assert parse_table(format_table(["name", "n"], rows).splitlines()) == [["name", "n"], *rows]


def test_what_is_needed_is_rounded_up_and_what_there_is_down():
    limit = 44 * 2**30
    assert show_bytes_down(limit) == show_bytes_up(limit) == "44.0 GiB"
    assert show_bytes_up(limit + 1) == "44.1 GiB"
    assert show_bytes_down(limit - 1) == "43.9 GiB"
    assert f"{Quantity('44.0 GiB')!r}" == "44.0 GiB"
