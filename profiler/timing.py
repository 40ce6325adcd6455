"""Timing of a call until its median is known well enough."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Protocol, Self

import numpy as np


class Timer(Protocol):
    """Times calls on one kind of device."""

    def call_s(self, function: Callable[[], object]) -> float:
        """Run ``function`` once; seconds until the device is done."""
        ...

    def now_s(self) -> float:
        """Clock of the host, against which limits are kept."""
        ...


class CpuTimer:
    """Work is done when the call returns.

    While another process has the core, an operator does not run: such time is left out, by the processor
    time of this process, which stops then. It is read around the wall clock, because reading it is slow (half
    a microsecond), and counts only where it is shorter.

    Args:
        clock: Clock of monotonic seconds.
        processor_clock: Seconds that this process has computed.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.perf_counter,
        processor_clock: Callable[[], float] = time.process_time,
    ) -> None:
        self._clock = clock
        self._processor_clock = processor_clock
        self.elapsed_s = 0.0
        """Seconds in timed calls."""
        self.computed_s = 0.0
        """Seconds of these in which the process had the core."""

    def call_s(self, function: Callable[[], object]) -> float:
        """Run ``function`` once; seconds until it has returned, without those that others had the core."""
        computed_before_s = self._processor_clock()
        start_s = self._clock()
        function()
        elapsed_s = self._clock() - start_s
        computed_s = min(elapsed_s, self._processor_clock() - computed_before_s)
        self.elapsed_s += elapsed_s
        self.computed_s += computed_s
        return computed_s

    def now_s(self) -> float:
        """The clock."""
        return self._clock()


class WallTimer:
    """Waiting counts: for calls that need other ranks.

    Args:
        clock: Clock of monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock

    def call_s(self, function: Callable[[], object]) -> float:
        """Run ``function`` once; seconds until it has returned."""
        start_s = self._clock()
        function()
        return self._clock() - start_s

    def now_s(self) -> float:
        """The clock."""
        return self._clock()


class CudaEvent(Protocol):
    """A mark in the order of a device's work, as ``torch.cuda.Event``."""

    def record(self) -> None:
        """Put the mark behind the work given so far."""
        ...

    def synchronize(self) -> None:
        """Wait until the device has come to it."""
        ...

    def elapsed_time(self, end_event: Self) -> float:
        """Milliseconds from this mark to a later one."""
        ...


class CudaTimer:
    """Kernels run later than the call that starts them: events on the current device say when.

    Args:
        new_event: Makes an event that keeps the time.
        before: Called before each timed call, with work for the device that does not count.
    """

    def __init__(
        self, new_event: Callable[[], CudaEvent], before: Callable[[], object] | None = None
    ) -> None:
        self._new_event = new_event
        self._before = before

    def call_s(self, function: Callable[[], object]) -> float:
        """Run ``function`` once; seconds between the events around its kernels."""
        if self._before is not None:
            self._before()
        start, stop = self._new_event(), self._new_event()
        start.record()
        function()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3  # milliseconds

    def now_s(self) -> float:
        """Clock of the host."""
        return time.perf_counter()


@dataclass(frozen=True, slots=True)
class Sample:
    """Distribution of repeated timings."""

    median_s: float
    p10_s: float
    p90_s: float
    repetitions: int


RELATIVE_ERROR = 0.02
"""Standard error of the median, relative to it, at which a measurement ends."""

MIN_REPETITIONS = 5

_WARM_UP = 3
"""Untimed calls at least: the heap grows to what an operator needs, and lazily built kernels are built."""

_LOOKS = 1.25
"""The error is looked at after every quarter more repetitions; a look sorts all of them."""


def time_repeatedly(
    copies: Sequence[Sequence[Callable[[], object]]], timer: Timer, *, limit_s: float
) -> list[Sample]:
    """Time calls in turn until the median of each is known to 2% or ``limit_s`` have passed.

    Args:
        copies: Calls that are alike but on different memory, so that none finds its own data in the cache.
            Those of one copy follow each other (a forward and its backward, say) and are timed one by one.
        timer: Timer of the device.
        limit_s: Seconds after which the error no longer matters; five repetitions there are in any case.

    Returns:
        Timings of each call of a copy.
    """
    for calls, _ in zip(cycle(copies), range(max(len(copies), _WARM_UP)), strict=False):
        warm_s = sum(timer.call_s(call) for call in calls)
        if warm_s * MIN_REPETITIONS > limit_s:
            break  # of a call that is long, the first on each of the other copies is no different
    deadline_s = timer.now_s() + limit_s
    times_s: list[list[float]] = []
    next_look = MIN_REPETITIONS
    for calls in cycle(copies):
        times_s.append([timer.call_s(call) for call in calls])
        if len(times_s) < next_look:
            continue
        columns = list(zip(*times_s, strict=True))
        if timer.now_s() >= deadline_s or all(median_error(each) <= RELATIVE_ERROR for each in columns):
            break
        # Long calls look every time, so that they keep to the limit.
        long = sum(times_s[-1]) * _LONG_CALLS > limit_s
        next_look = len(times_s) + 1 if long else int(len(times_s) * _LOOKS) + 1
    return [summarize(each) for each in zip(*times_s, strict=True)]


_LONG_CALLS = 50
"""A call is long when fewer than so many fit into the limit."""


def median_error(times_s: Sequence[float]) -> float:
    """Standard error of the median, relative to it, from the interquartile range.

    A normal distribution has an interquartile range of 1.349 standard deviations, and its median has a
    standard error of 1.2533 standard deviations over the root of the count.
    """
    low, median, high = np.quantile(times_s, (0.25, 0.5, 0.75))
    return float(1.2533 / 1.349 * (high - low) / median / np.sqrt(len(times_s)))


def summarize(times_s: Sequence[float]) -> Sample:
    """Median and spread of timings."""
    p10, median, p90 = (float(q) for q in np.quantile(times_s, (0.1, 0.5, 0.9)))
    return Sample(median, p10, p90, len(times_s))


def merge_samples(samples: Sequence[Sample]) -> Sample:
    """Samples of several ranks and rounds as one: the median of each quantile."""
    return Sample(
        float(np.median([sample.median_s for sample in samples])),
        float(np.median([sample.p10_s for sample in samples])),
        float(np.median([sample.p90_s for sample in samples])),
        sum(sample.repetitions for sample in samples),
    )
