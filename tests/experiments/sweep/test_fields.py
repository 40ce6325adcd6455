"""Paths into plain data."""

from __future__ import annotations

import pytest

from experiments.sweep.fields import CombinationError, Selector, assign, parse_field
from muxtune.support.errors import SpecError


def test_a_path_has_keys_and_selectors():
    parts = parse_field("workload.tasks[*].peft.r")
    assert parts == ("workload", "tasks", Selector("*"), "peft", "r")
    assert parse_field("tasks[rte-2.b][0]") == ("tasks", Selector("rte-2.b"), Selector("0"))


@pytest.mark.parametrize("path", ["", "[0].a", "a..b", "a.", ".a", "a[", "a[b", "a b", "a[1]b", "a[+1]"])
def test_what_is_no_path_is_refused(path):
    with pytest.raises(SpecError, match=r"expected a path such as workload\.tasks"):
        parse_field(path)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("tasks[*].r", [9, 9, 9]),
        ("tasks[0].r", [9, 2, 3]),
        ("tasks[b].r", [1, 9, 3]),
        ("tasks[2].r", [1, 2, 9]),
    ],
)
def test_selectors_choose_all_or_one_by_position_or_by_id(path, expected):
    content = {"tasks": [{"id": "a", "r": 1}, {"id": "b", "r": 2}, {"id": "0x", "r": 3}]}
    assign(content, path, parse_field(path), 9)
    assert [each["r"] for each in content["tasks"]] == expected


def test_an_id_that_looks_like_a_position_is_an_id():
    content = {"tasks": [{"id": "1", "r": 1}, {"id": "0", "r": 2}]}
    assign(content, "tasks[1].r", parse_field("tasks[1].r"), 9)
    assert [each["r"] for each in content["tasks"]] == [9, 2]


def test_missing_mappings_are_made_and_elements_replaced():
    content = {"a": None, "n": [1, 2, 2]}
    assign(content, "a.b.c", parse_field("a.b.c"), 1)
    assign(content, "n[1]", parse_field("n[1]"), 7)
    assert content == {"a": {"b": {"c": 1}}, "n": [1, 7, 2]}


def test_a_path_through_something_else_is_refused():
    for path, expected in (
        ("a.b", "a mapping that may have the field b"),
        ("a[0].b", "a list to select from"),
    ):
        with pytest.raises(SpecError, match=expected):
            assign({"a": 3}, path, parse_field(path), 1)


def test_an_absent_element_is_a_matter_of_the_combination():
    for path in ("tasks[2].r", "tasks[c].r"):
        with pytest.raises(CombinationError, match="expected an id, or a position below 2"):
            assign({"tasks": [{"id": "a"}, {"id": "b"}]}, path, parse_field(path), 1)
