"""Partitions that a user fixes."""

from __future__ import annotations

import pytest

from muxtune.planning.decisions.options import parse_partition
from muxtune.support.errors import SpecError


def test_partition_text_names_every_group():
    assert parse_partition("a+b, c", ["a", "b", "c"]) == [("a", "b"), ("c",)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a+x,b", "--partition = 'x': expected one of a, b"),
        ("a+b,a", "a stands 2 times"),
        ("a", "b is missing"),
        ("a,,b", "expected one of a, b"),
    ],
)
def test_wrong_partitions_are_refused(text, message):
    with pytest.raises(SpecError, match=message):
        parse_partition(text, ["a", "b"])
