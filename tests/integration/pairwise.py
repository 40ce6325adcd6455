"""Few rows that hold every pair of values of a table: most faults need one value, or two that meet."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, product

from tests.sampling import FULL

Row = tuple[object, ...]
"""A value of each dimension."""

Pair = tuple[int, object, int, object]
"""Two dimensions by their positions, and a value of each."""


def pairs_of(row: Row) -> set[Pair]:
    """All pairs of values that meet in a row."""
    return {(i, a, j, b) for (i, a), (j, b) in combinations(enumerate(row), 2)}


def covering_rows(dimensions: Sequence[Sequence[object]]) -> list[Row]:
    """Rows in which every two values of different dimensions meet at least once.

    Greedy, after AETG (Cohen et al., IEEE TSE 23(7), 1997), but looking at the whole product,
    which is small here: the next row is the first of those with most pairs that are still missing. No set of
    rows can be smaller than the product of the two largest dimensions.
    """
    candidates = [(row, pairs_of(row)) for row in product(*dimensions)]
    missing: set[Pair] = set().union(*(pairs for _, pairs in candidates))
    rows = []
    while missing:
        row, pairs = max(candidates, key=lambda candidate: len(candidate[1] & missing))
        rows.append(row)
        missing -= pairs
    return rows


def sampled_product(*dimensions: Sequence[object]) -> list[Row]:
    """All rows of the product in a full run; else some in which every two values meet."""
    numbers = [range(len(values)) for values in dimensions]
    rows = product(*numbers) if FULL else covering_rows(numbers)
    return [tuple(values[i] for values, i in zip(dimensions, row, strict=True)) for row in rows]
