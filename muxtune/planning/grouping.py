"""Grouping of hTasks into buckets and the order in which buckets enter the pipeline (paper section 3.4)."""

from __future__ import annotations

from collections.abc import Sequence


def bucket_candidates(latency_s: Sequence[float]) -> list[tuple[tuple[int, ...], ...]]:
    """One balanced grouping per bucket count, buckets by descending latency.

    Args:
        latency_s: Per hTask, seconds of one micro-batch on the slowest stage.

    Returns:
        Groupings into 1, 2, ... buckets without repetitions; inside a bucket, the slowest hTask is first.
    """
    groupings: list[tuple[tuple[int, ...], ...]] = []
    for count in range(1, len(latency_s) + 1):
        grouping = balanced_buckets(latency_s, count)
        if grouping not in groupings:
            groupings.append(grouping)
    return groupings


def balanced_buckets(latency_s: Sequence[float], count: int) -> tuple[tuple[int, ...], ...]:
    """``count`` buckets of near-equal total latency: longest first, into the emptiest bucket."""
    slowest_first = sorted(range(len(latency_s)), key=lambda h: (-latency_s[h], h))
    buckets: list[list[int]] = [[] for _ in range(count)]
    filled = [0.0] * count
    for h in slowest_first:
        target = min(range(count), key=lambda b: (filled[b], b))
        buckets[target].append(h)
        filled[target] += latency_s[h]
    order = sorted(range(count), key=lambda b: (-filled[b], b))
    return tuple(tuple(buckets[b]) for b in order)
