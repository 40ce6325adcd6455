"""How much of a stretch of time torch's kernels take, as torch's own profiler tells it.

Every event that the profiler notes on the calling thread counts with its self time, that is without the
events inside of it, as one of

kernel       operators that compute or move elements (``aten::addmm``, ``mkldnn::_linear_pointwise``, ...)
bookkeeping  operators that only describe or allocate tensors (``aten::view``, ``aten::empty``, ...)

Everything else is neither: Python, functions of autograd and its engine, and whatever is outside of events.
An operator's self time has its dispatch in C++ in it, and a part of the profiler's own cost.
"""

from __future__ import annotations

import os
import threading
import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from types import TracebackType
from typing import Protocol

from torch.autograd.profiler import profile, record_function

_OPERATORS = ("aten::", "mkldnn::")

_BOOKKEEPING = frozenset(
    "aten::" + name
    for name in (
        *("alias", "as_strided", "chunk", "detach", "detach_", "expand", "flatten", "narrow", "permute"),
        *(
            "reshape",
            "_reshape_alias",
            "resize_",
            "resolve_conj",
            "select",
            "slice",
            "split",
            "split_with_sizes",
            "squeeze",
        ),
        *("t", "transpose", "unbind", "unflatten", "unsqueeze", "view", "view_as", "_unsafe_view"),
        *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
    )
)

_MARK = "benchmarks.helpers.kernel_time: mark"
_MARKS = 5


class ProfiledEvent(Protocol):
    """What we read of an event of ``torch.autograd.profiler.profile.kineto_results``."""

    def name(self) -> str:
        """Name of the operator, function or mark."""
        ...

    def start_ns(self) -> int:
        """Start on the profiler's clock."""
        ...

    def duration_ns(self) -> int:
        """Duration with everything inside of it."""
        ...

    def device_resource_id(self) -> int:
        """Thread, as the operating system numbers them."""
        ...


@dataclass(frozen=True, slots=True)
class Parts:
    """Parts of a stretch of time."""

    kernel_s: float
    bookkeeping_s: float
    operators: int
    """Number of operators of both kinds."""


class KernelTimes:
    """Profiles the ``with`` block; afterwards :meth:`between` tells of any stretch of it."""

    def __init__(self) -> None:
        self._profile = profile(use_cpu=True, use_kineto=True)
        self._marked_ns: list[int] = []
        self._starts_ns: list[int] = []
        self._sums: dict[str, list[int]] = {}

    def __enter__(self) -> KernelTimes:
        # The profiler's library would write a line per start to stderr; it reads this when it first logs.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        self._profile.__enter__()
        for _ in range(_MARKS):
            self._marked_ns.append(time.perf_counter_ns())
            with record_function(_MARK):
                pass
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._profile.__exit__(kind, error, trace)
        if error is not None:
            return
        assert self._profile.kineto_results is not None
        own = threading.get_native_id()
        events = [
            event
            for event in self._profile.kineto_results.events()
            if event.name() != "[memory]" and event.device_resource_id() == own
        ]
        marks = sorted(event.start_ns() for event in events if event.name() == _MARK)
        # The profiler has a clock of its own; the quickest mark is closest to both readings.
        shift_ns = min(mark - told for mark, told in zip(marks, self._marked_ns, strict=True))
        timed = sorted(self_times(events))
        self._starts_ns = [start_ns - shift_ns for start_ns, _, _ in timed]
        for group in ("kernel", "bookkeeping"):
            own_ns = (self_ns if each == group else 0 for _, self_ns, each in timed)
            self._sums[group] = [0, *accumulate(own_ns)]
        self._sums["count"] = [0, *accumulate(int(bool(group)) for _, _, group in timed)]

    def between(self, start_ns: int, end_ns: int) -> Parts:
        """Parts of the time between two readings of ``time.perf_counter_ns``."""
        first, last = bisect_left(self._starts_ns, start_ns), bisect_left(self._starts_ns, end_ns)
        kernel, bookkeeping, count = (sums[last] - sums[first] for sums in self._sums.values())
        return Parts(kernel / 1e9, bookkeeping / 1e9, count)


def self_times(events: Sequence[ProfiledEvent]) -> Iterator[tuple[int, int, str]]:
    """(start, self nanoseconds, group) of every event of one thread."""
    # Parents first: of events that begin together, the longer one has the other inside.
    ordered = sorted(events, key=lambda event: (event.start_ns(), -event.duration_ns()))
    open_events: list[tuple[int, int, str]] = []  # end, start, group
    inside_ns: list[int] = []
    for event in ordered:
        start_ns, duration_ns = event.start_ns(), event.duration_ns()
        while open_events and open_events[-1][0] <= start_ns:
            yield _closed(open_events, inside_ns)
        if inside_ns:
            inside_ns[-1] += duration_ns
        open_events.append((start_ns + duration_ns, start_ns, _group(event.name())))
        inside_ns.append(0)
    while open_events:
        yield _closed(open_events, inside_ns)


def _closed(open_events: list[tuple[int, int, str]], inside_ns: list[int]) -> tuple[int, int, str]:
    end_ns, start_ns, group = open_events.pop()
    return start_ns, end_ns - start_ns - inside_ns.pop(), group


def _group(name: str) -> str:
    """``kernel``, ``bookkeeping`` or nothing."""
    if not name.startswith(_OPERATORS):
        return ""
    return "bookkeeping" if name in _BOOKKEEPING else "kernel"
