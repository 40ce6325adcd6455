"""When things happened on a rank: by the host's clock, or on a GPU by events between its kernels.

A processor has done an action when the call returns. A GPU has only been told to: its actions are timed by
events that pass when the work before them has been done, and are read later, so that nothing waits for them.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol


@dataclass(slots=True, eq=False)
class EventMark:
    """A moment of a GPU's work, as long as somebody wants to know it."""

    time_s: float | None = None
    """Seconds, once its event has been read."""


Mark = int | EventMark
"""Moment on a host or a GPU; only the stopwatch that made it can read it."""


class Stopwatch(Protocol):
    """Marks moments now, and tells later when they were."""

    def begin(self, origin_ns: int) -> None:
        """Count from this reading of ``time.perf_counter_ns``."""

    def now(self) -> Mark:
        """Mark this moment of the work."""

    def has_passed(self, mark: Mark) -> bool:
        """Whether a mark is known to have passed; on a GPU, since the last :meth:`settle`."""

    def seconds(self, mark: Mark) -> float:
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

    def has_passed(self, mark: Mark) -> bool:
        """Always: the clock has been read."""
        del mark
        return True

    def seconds(self, mark: Mark) -> float:
        """Seconds from the origin to a mark."""
        assert isinstance(mark, int)
        return (mark - self._origin_ns) / 1e9

    def settle(self) -> None:
        """Nothing is held."""


class Event(Protocol):
    """What we need of ``torch.cuda.Event(enable_timing=True)``."""

    def record(self) -> None:
        """Let it pass when the current stream has come here."""

    def query(self) -> bool:
        """Whether the event has passed."""

    def synchronize(self) -> None:
        """Wait until the event has passed."""

    def elapsed_time(self, end_event: Event, /) -> float:
        """Milliseconds to an event that has passed after this one."""


class EventStopwatch:
    """Events in the streams of a GPU.

    Args:
        new_event: Makes one that keeps its time.
        clock_ns: Clock of the host, which says when the run began.
    """

    def __init__(
        self, new_event: Callable[[], Event], clock_ns: Callable[[], int] = time.perf_counter_ns
    ) -> None:
        self._new_event = new_event
        self._clock_ns = clock_ns
        self._unread: deque[tuple[EventMark, Event]] = deque()
        self._base: tuple[Event, float] | None = None

    def begin(self, origin_ns: int) -> None:
        """Count from this reading of ``time.perf_counter_ns``; waits until the GPU is idle."""
        event = self._new_event()
        event.record()
        event.synchronize()
        self._base = event, (self._clock_ns() - origin_ns) / 1e9

    def now(self) -> EventMark:
        """Mark this moment of the current stream."""
        mark, event = EventMark(), self._new_event()
        event.record()
        self._unread.append((mark, event))
        return mark

    def has_passed(self, mark: Mark) -> bool:
        """Whether a mark is known to have passed, since the last :meth:`settle`."""
        assert isinstance(mark, EventMark)
        return mark.time_s is not None

    def seconds(self, mark: Mark) -> float:
        """Seconds from the origin to a mark; waits if it has not passed."""
        assert isinstance(mark, EventMark)
        while mark.time_s is None:
            self._unread[0][1].synchronize()
            self._read()
        return mark.time_s

    def settle(self) -> None:
        """Read the marks that have passed, in their order, up to the first that has not."""
        while self._unread and self._unread[0][1].query():
            self._read()

    def _read(self) -> None:
        assert self._base is not None, "begin() comes first"
        (mark, event), (base, base_s) = self._unread.popleft(), self._base
        time_s = mark.time_s = base_s + base.elapsed_time(event) / 1e3
        # From the newest event on: a difference is a float32, which knows 0.1 ms after half an hour.
        if time_s > base_s:
            self._base = event, time_s
