"""Buckets: every hTask once, balanced, slowest first."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from muxtune.planning.grouping import balanced_buckets, bucket_candidates

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


def test_all_bucket_counts_are_proposed():
    assert [len(g) for g in bucket_candidates([4.0, 3.0, 2.0, 1.0])] == [1, 2, 3, 4]
