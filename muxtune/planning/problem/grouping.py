"""Grouping of hTasks into buckets and the order in which buckets enter the pipeline (paper section 3.4)."""

from __future__ import annotations

from collections.abc import Sequence


def bucket_candidates(latency_s: Sequence[float]) -> list[tuple[tuple[int, ...], ...]]:
    """Balanced groupings for every bucket count, buckets by descending latency.

    Inside a bucket the hTasks take turns, slowest first or slowest last. That decides who is left over at its
    end: if it is the hTask that also begins the next iteration, ``continuous`` has to drain for its step.

    Args:
        latency_s: Per hTask, seconds of one micro-batch on the slowest stage.

    Returns:
        Groupings into 1, 2, ... buckets, without repetitions.
    """
    groupings: dict[tuple[tuple[int, ...], ...], None] = {}  # a set that keeps the order
    for count in range(1, len(latency_s) + 1):
        slowest_first = balanced_buckets(latency_s, count)
        groupings[slowest_first] = None
        groupings[tuple(bucket[::-1] for bucket in slowest_first)] = None
    return list(groupings)


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
