"""Processes that start together and end together, over a few bytes of shared memory."""

from __future__ import annotations

import mmap
import os
import time
from pathlib import Path

_COUNTER_BYTES = 8


class OrphanedError(Exception):
    """The process that started the measurement is gone."""


class Rendezvous:
    """One counter per rank in a shared file. Waiting is a busy loop: sleeping would let the core cool down.

    Args:
        path: File of :func:`create_rendezvous`.
        rank: Of this process.
        ranks: How many meet.
        parent: Process whose end ends the wait, because its children would otherwise wait for ever.
    """

    def __init__(self, path: Path, rank: int, ranks: int, parent: int) -> None:
        with path.open("r+b") as file:
            self._counters = memoryview(mmap.mmap(file.fileno(), ranks * _COUNTER_BYTES)).cast("q")
        self._rank = rank
        self._parent = parent

    def arrive(self) -> None:
        """Say that this rank has got one point further."""
        self._counters[self._rank] += 1

    def all_arrived(self) -> bool:
        """Whether every rank has got as far as this one."""
        return min(self._counters) >= self._counters[self._rank]

    def meet(self) -> None:
        """Arrive, and wait for the others.

        Raises:
            OrphanedError: The parent process is gone.
        """
        self.arrive()
        checked_s = time.monotonic()
        while not self.all_arrived():
            if time.monotonic() - checked_s > 0.1:  # noqa: PLR2004  # seconds
                self.check_parent()
                checked_s = time.monotonic()

    def check_parent(self) -> None:
        """Raise ``OrphanedError`` if the parent process is gone."""
        if os.getppid() != self._parent:
            raise OrphanedError


def create_rendezvous(path: Path, ranks: int) -> None:
    """Write the shared file, all counters at zero."""
    path.write_bytes(bytes(ranks * _COUNTER_BYTES))
