"""What Perfetto makes of complete events in Chrome's trace format."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any


def perfetto_stacks(
    events: Sequence[Mapping[str, Any]], to_ns: Callable[[float], int] = round
) -> list[list[str]]:
    """Names of the events around each one, outermost first.

    Perfetto's importer takes events in the order of their starts, equal ones in the order of the file, and
    keeps a stack per thread: it closes what has ended, and drops what begins inside the innermost open slice
    and ends after it (its statistic ``slice_drop_overlapping_complete_event``).

    Args:
        events: Of phase ``X``.
        to_ns: What it does with a thousand times ``ts`` and ``dur``: older versions cut, newer ones round.

    Raises:
        AssertionError: An event would be dropped.
    """
    parents: dict[int, list[str]] = {}
    stacks: dict[tuple[int, int], list[tuple[str, int]]] = {}
    for position, event in sorted(enumerate(events), key=lambda entry: to_ns(entry[1]["ts"] * 1000)):
        start_ns = to_ns(event["ts"] * 1000)
        end_ns = start_ns + to_ns(event["dur"] * 1000)
        stack = stacks.setdefault((event["pid"], event["tid"]), [])
        while stack and stack[-1][1] <= start_ns:
            stack.pop()
        assert not stack or end_ns <= stack[-1][1], f"{event} overlaps {stack[-1]} and is dropped"
        parents[position] = [name for name, _ in stack]
        stack.append((event["name"], end_ns))
    return [parents[position] for position in range(len(events))]
