"""Work of a backward that nobody waits for, put off until its turn comes.

The gradients of an adapter's factors are needed at the optimizer step; the gradient of its input is needed
at once, by the sum over the ranks of the stage. Where the actions of a clock take turns, the first are
computed while such a sum is under way (paper section 3.4).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Call = Callable[[], None]


class SideWork:
    """What one action has put off, in order."""

    def __init__(self) -> None:
        self.segment = 0
        """Number of the part of the action that runs: of the sums that it has waited for."""
        self._waiting: deque[tuple[int, Call]] = deque()

    def put(self, call: Call) -> None:
        """Put off a call."""
        self._waiting.append((self.segment, call))

    def waits(self, segment: int | None = None) -> bool:
        """Whether something is left of the parts up to this one, or at all."""
        return bool(self._waiting) and (segment is None or self._waiting[0][0] <= segment)

    def run(self, segment: int | None = None) -> None:
        """Make the calls that were put off in the parts up to this one, or all."""
        while self.waits(segment):
            self._waiting.popleft()[1]()


_thread = threading.local()


@contextmanager
def collecting(side: SideWork) -> Iterator[None]:
    """Let this thread put off what it can in the ``with`` block."""
    _thread.side = side
    try:
        yield
    finally:
        _thread.side = None


def side_work() -> SideWork | None:
    """Where this thread puts off what it can; None if everything is to be done at once."""
    found: SideWork | None = getattr(_thread, "side", None)
    return found
