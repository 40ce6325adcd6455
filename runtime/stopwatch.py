"""When things happened on a rank: by the host's clock, or on a GPU by events between its kernels.

A processor has done an action when the call returns. A GPU has only been told to: its actions are timed by
events that pass when the work before them has been done, and are read later, so that nothing waits for them.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Protocol


class Stopwatch(Protocol):
    """Marks moments now, and tells later when they were."""

    def begin(self, origin_ns: int) -> None:
        """Count from this reading of ``time.perf_counter_ns``."""

    def now(self) -> int:
        """Mark this moment of the work; a number that only this stopwatch can read."""

    def has_passed(self, mark: int) -> bool:
        """Whether a mark is known to have passed; on a GPU, since the last :meth:`settle`."""

    def seconds(self, mark: int) -> float:
        """Seconds from the origin to a mark; waits if it has not passed."""

    def settle(self) -> None:
        """Read the marks that have passed, and let go what they held; never waits."""


class HostStopwatch:
    """The host's clock: a mark is its reading."""

    def __init__(self) -> None:
        self._origin_ns = 0

    def begin(self, origin_ns: int) -> None:
        """Count from this reading of ``time.perf_counter_ns``."""
        self._origin_ns = origin_ns

    def now(self) -> int:
        """Read the clock."""
        return time.perf_counter_ns()

    def has_passed(self, mark: int) -> bool:
        """Always: the clock has been read."""
        del mark
        return True

    def seconds(self, mark: int) -> float:
        """Seconds from the origin to a mark."""
        return (mark - self._origin_ns) / 1e9

    def settle(self) -> None:
        """Nothing is held."""


class Event(Protocol):
    """What we need of ``torch.cuda.Event(enable_timing=True)``."""

    def record(self) -> None:
        """Let it pass when the current stream has come here."""

    def query(self) -> bool:
        """Whether it has passed."""

    def synchronize(self) -> None:
        """Wait until it has."""

    def elapsed_time(self, end_event: Event, /) -> float:
        """Milliseconds to an event that has passed after this one."""


class EventStopwatch:
    """Events in the streams of a GPU; a mark is an event's number.

    Args:
        new_event: Makes one that keeps its time.
        clock_ns: Of the host, which says when the run began.
    """

    def __init__(
        self, new_event: Callable[[], Event], clock_ns: Callable[[], int] = time.perf_counter_ns
    ) -> None:
        self._new_event = new_event
        self._clock_ns = clock_ns
        self._times_s: list[float] = []
        """Of the marks that have been read: the first ones."""
        self._unread: deque[Event] = deque()
        self._base: tuple[Event, float] | None = None

    def begin(self, origin_ns: int) -> None:
        """Count from this reading of ``time.perf_counter_ns``; waits until the GPU is idle."""
        event = self._new_event()
        event.record()
        event.synchronize()
        self._base = event, (self._clock_ns() - origin_ns) / 1e9

    def now(self) -> int:
        """Mark this moment of the current stream."""
        event = self._new_event()
        event.record()
        self._unread.append(event)
        return len(self._times_s) + len(self._unread) - 1

    def has_passed(self, mark: int) -> bool:
        """Whether a mark is known to have passed, since the last :meth:`settle`."""
        return mark < len(self._times_s)

    def seconds(self, mark: int) -> float:
        """Seconds from the origin to a mark; waits if it has not passed."""
        while mark >= len(self._times_s):
            self._unread[0].synchronize()
            self._read()
        return self._times_s[mark]

    def settle(self) -> None:
        """Read the marks that have passed, in their order, up to the first that has not."""
        while self._unread and self._unread[0].query():
            self._read()

    def _read(self) -> None:
        assert self._base is not None, "begin() comes first"
        event, (base, base_s) = self._unread.popleft(), self._base
        time_s = base_s + base.elapsed_time(event) / 1e3
        self._times_s.append(time_s)
        # From the newest event on: a difference is a float32, which knows 0.1 ms after half an hour.
        if time_s > base_s:
            self._base = event, time_s
