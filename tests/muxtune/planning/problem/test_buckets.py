"""Buckets: every hTask once, balanced, slowest first."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxtune.planning.problem.schedules import balanced_buckets, bucket_candidates
from muxtune.schedule import StageTimes, build_schedule, evaluate_schedule, steady_iteration_s

LATENCIES = st.lists(st.floats(0.01, 10), min_size=1, max_size=10)


@given(LATENCIES)
def test_every_candidate_holds_every_htask_once_and_descends(latency_s):
    for grouping in bucket_candidates(latency_s):
        assert sorted(h for bucket in grouping for h in bucket) == list(range(len(latency_s)))
        totals = [sum(latency_s[h] for h in bucket) for bucket in grouping]
        assert all(a >= b - 1e-9 for a, b in pairwise(totals))


@given(LATENCIES, st.integers(1, 10))
def test_buckets_are_balanced_to_within_the_longest_htask(latency_s, count):
    count = min(count, len(latency_s))
    totals = [sum(latency_s[h] for h in bucket) for bucket in balanced_buckets(latency_s, count)]
    assert max(totals) - min(totals) <= max(latency_s) + 1e-9


def test_all_bucket_counts_are_proposed_in_both_orders_of_turns():
    candidates = bucket_candidates([3.0, 2.0, 1.0])
    assert candidates == [((0, 1, 2),), ((2, 1, 0),), ((0,), (1, 2)), ((0,), (2, 1)), ((0,), (1,), (2,))]


def test_the_htask_that_is_left_over_does_not_begin_the_next_iteration():
    """With 3 and 2 micro-batches, 0 1 0 1 0 drains before its next 0, and 1 0 1 0 0 does not."""
    times = StageTimes(fwd_s=[[1.0, 1.0]] * 2, bwd_s=[[2.0, 2.0]] * 2, p2p_s=[0.0, 0.0])
    seconds = {}
    for grouping in bucket_candidates([3.0, 3.0]):
        stages = build_schedule(grouping, (3, 2), pp=2, template="continuous", steps=[4, 4])
        seconds[grouping] = steady_iteration_s(evaluate_schedule(stages, times))
    assert seconds[(0, 1),] == pytest.approx(18.0)
    assert seconds[(1, 0),] == pytest.approx(15.0)
