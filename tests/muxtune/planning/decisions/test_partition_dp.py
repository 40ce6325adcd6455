"""Partitions by dynamic programming against all partitions."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxtune.planning.decisions.partition_dp import cheapest_cuts, paced_cuts

Groups = list[tuple[int, int]]


def partitions(n: int, width: int) -> Iterator[Groups]:
    """Contiguous partitions as (end, width - 1) of each group."""
    for count in range(n):
        for cut in combinations(range(1, n), count):
            groups = [(stop - 1, stop - start - 1) for start, stop in pairwise((0, *cut, n))]
            if all(w < width for _, w in groups):
                yield groups


@st.composite
def bands(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of a micro-batch, some infinite, and micro-batches."""
    n = draw(st.integers(1, 7))
    width = draw(st.integers(1, n))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    seconds = rng.uniform(1, 10, (n, width))
    seconds[rng.random((n, width)) < 0.2] = np.inf
    seconds[np.arange(width) > np.arange(n)[:, None]] = np.inf
    return seconds, rng.integers(1, 5, (n, width)).astype(float)


@given(bands())
def test_cheapest_partition_for_every_number_of_groups(band):
    seconds, microbatches = band
    cost = seconds * microbatches
    n, width = cost.shape
    cuts = cheapest_cuts(cost, n)
    for count in range(1, n + 1):
        totals = [sum(cost[g] for g in groups) for groups in partitions(n, width) if len(groups) == count]
        assert cuts.total[count] == pytest.approx(min(totals, default=np.inf))
        if np.isfinite(cuts.total[count]):
            ends, widths = cuts.places(count)
            assert len(ends) == count
            assert cost[ends, widths].sum() == pytest.approx(cuts.total[count])
            starts = ends - widths
            assert (starts[0], ends[-1]) == (0, n - 1)
            assert (starts[1:] == ends[:-1] + 1).all()


@given(bands(), st.floats(1, 12), st.sampled_from([0.0, 0.5, 1.0]))
def test_cheapest_partition_at_a_pace(band, pace, charged):
    seconds, microbatches = band

    def cost(group: tuple[int, int]) -> float:
        t = seconds[group]
        return microbatches[group] * (t + charged * (pace - t)) if t <= pace else np.inf

    totals = [sum(map(cost, groups)) for groups in partitions(*seconds.shape)]
    found = paced_cuts(seconds, microbatches, np.array([pace]), np.array([charged]))
    if not np.isfinite(min(totals)):
        assert not found
        return
    ((ends, widths),) = found
    assert sum(map(cost, zip(ends.tolist(), widths.tolist(), strict=True))) == pytest.approx(min(totals))


def test_partitions_that_repeat_come_once():
    seconds = np.array([[1.0, np.inf], [1.0, 2.0]])
    ones = np.ones((2, 2))
    assert len(paced_cuts(seconds, ones, np.array([1.0, 1.5, 5.0]), np.zeros(3))) == 1
    assert len(paced_cuts(seconds, ones, np.array([1.0, 5.0]), np.ones(2))) == 2  # the pace charges for two


def test_search_gives_up_where_more_groups_cost_much_more():
    cost = np.where(np.arange(8) <= np.arange(8)[:, None], 1.0, np.inf)  # whatever the width
    assert np.isfinite(cheapest_cuts(cost, 8).total[1:]).all()
    assert len(cheapest_cuts(cost, 8, give_up=2.5).total) == 4  # none, 1, 2 and 3 groups
