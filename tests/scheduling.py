"""Which tests stay on one worker of pytest-xdist, and which modules begin."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

RUNS = "tests/integration/"
"""Folder of the tests that start the processes of runs."""

BESIDE_SOLO_RUNS = frozenset(f"{RUNS}test_{name}.py" for name in ("parity", "parity_matrix"))
"""Modules that compare with the solo runs of ``solo_bench``, which a worker trains once."""


def module_of(nodeid: str) -> str:
    """File of a test."""
    return nodeid.partition("::")[0]


def scope_of(nodeid: str) -> str:
    """What stays on one worker: modules, since their tests share fixtures, and those that share solo runs."""
    module = module_of(nodeid)
    return "solo runs" if module in BESIDE_SOLO_RUNS else module


def longest_first(items: Iterable[pytest.Item]) -> list[pytest.Item]:
    """Tests in the order of collection, but long modules before short ones.

    Workers that take the next module whenever they are done end together if the last ones are short.
    """
    items = list(items)
    slow = {module_of(item.nodeid) for item in items if item.get_closest_marker("slow")}

    def rank(item: pytest.Item) -> int:
        module = module_of(item.nodeid)
        if module in BESIDE_SOLO_RUNS:
            return 0
        if module.startswith(RUNS):
            return 1
        return 2 if module in slow else 3

    return sorted(items, key=rank)
