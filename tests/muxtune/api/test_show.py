from __future__ import annotations

from muxtune.api.show import html_of
from muxtune.support.tables import format_table


def test_text_becomes_paragraphs_and_tables():
    text = "head\nsecond line\n\n" + format_table(["name", "n"], [["a", "1"], ["b|c", "22"]])
    html = html_of(text)
    assert html.startswith("<p>head<br>second line")
    assert html.count("<table>") == 1
    assert html.count("<tr>") == 3
    assert '<td style="text-align:left">b|c</td><td style="text-align:right">22</td>' in html


def test_what_users_wrote_is_no_markup():
    text = "<b>x</b>\n" + format_table(["<i>"], [["<script>"]])
    assert "<b>" not in html_of(text)
    assert "<script>" not in html_of(text)
    assert "&lt;script&gt;" in html_of(text)
