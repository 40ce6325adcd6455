"""Shows how far a session is, and about how long it will take."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from muxtune.costs.profile import Overlap
from muxtune.graph.operators import FWD_ONLY, LINK_KINDS
from profiler.jobs import Job
from profiler.worker_protocol import Line, Reading

OVERLAP_LIMITS = 8
"""An overlap is three timings, of which the other ranks disturb each; limits of one operator that it has."""

_START_S = 5.0
"""Seconds until processes measure: they load torch."""

_SURE_S = 2.0
"""So much of what was expected counts as if it had been seen, so that the first readings say no nonsense."""

_LINE_EVERY_S = 15.0


class Outlook:
    """Expected seconds of a session, from what its parts may take and how long those so far have taken.

    Operators come in random order, so those ahead are like those behind, and the estimate is steady.

    Args:
        job: What is measured.
        clock: Clock of monotonic seconds.
    """

    def __init__(self, job: Job, clock: Callable[[], float] = time.monotonic) -> None:
        self._job = job
        self._clock = clock
        self._start_s = clock()
        self._begun_s: float | None = None
        self._done_s = 0.0
        self.total_s = _START_S + sum(self._expected_s(kind) for kind, _ in (*job.operators, *job.links))
        self.total_s += len(job.overlaps) * OVERLAP_LIMITS * job.limit_s

    def saw(self, line: Line) -> None:
        """A part is done."""
        self._begun_s = self._begun_s or self._clock()
        if isinstance(line, Overlap):
            self._done_s += OVERLAP_LIMITS * self._job.limit_s
        elif isinstance(line, Reading):
            self._done_s += self._share_s(line)

    @property
    def done(self) -> float:
        """Part of the whole that is done."""
        return min(1.0, self._done_s / (self.total_s - _START_S)) if self._done_s else 0.0

    @property
    def left_s(self) -> float:
        """Seconds that are left."""
        if self._begun_s is None:
            return max(self.total_s - _START_S, self.total_s - (self._clock() - self._start_s))
        pace = (self._clock() - self._begun_s + _SURE_S) / (self._done_s + _SURE_S)
        return max(0.0, self.total_s - _START_S - self._done_s) * pace

    def _expected_s(self, kind: str) -> float:
        return self._job.limit_s * (1 if kind in FWD_ONLY else 2)

    def _share_s(self, line: Reading) -> float:
        if line.op.kind in LINK_KINDS:
            # A transfer has a reading of the message, too.
            return 0.0 if line.op.kind == "message" else self._job.limit_s
        return self._job.limit_s / self._job.ranks


@contextmanager
def shown(job: Job, *, wanted: bool) -> Iterator[Callable[[Line], None]]:
    """Show progress on stderr: a bar where there is a terminal, a line now and then elsewhere.

    Args:
        job: What is measured.
        wanted: Whether to show anything.

    Yields:
        To be told every line of the processes.
    """
    outlook = Outlook(job)
    title = f"profiling {job.model.name} on {job.device}"
    if not wanted:
        yield outlook.saw
    elif sys.stderr.isatty():
        with _bar(outlook, title) as saw:
            yield saw
    else:
        yield _lines(outlook, title)


@contextmanager
def _bar(outlook: Outlook, title: str) -> Iterator[Callable[[Line], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[left]}"))
    # Redrawn rarely: the bar shares the cores with what is measured.
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=1, transient=True) as bar:
        task = bar.add_task(title, total=1.0, left=_left(outlook))

        def saw(line: Line) -> None:
            outlook.saw(line)
            bar.update(task, completed=outlook.done, left=_left(outlook))

        yield saw


def _lines(outlook: Outlook, title: str) -> Callable[[Line], None]:
    next_s = time.monotonic()

    def saw(line: Line) -> None:
        nonlocal next_s
        outlook.saw(line)
        if time.monotonic() >= next_s:
            next_s = time.monotonic() + _LINE_EVERY_S
            sys.stderr.write(f"muxtune: {title}: {outlook.done:.0%}, {_left(outlook)}\n")

    return saw


def _left(outlook: Outlook) -> str:
    """Time that is left, as exactly as it is known."""
    seconds = outlook.left_s
    step = 5 if seconds < 60 else 10
    return f"about {max(step, step * round(seconds / step))} s left"
