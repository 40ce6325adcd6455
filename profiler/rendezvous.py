"""Processes that start together and end together, over a few bytes of shared memory."""

from __future__ import annotations

import mmap
from pathlib import Path

_COUNTER_BYTES = 8


class Rendezvous:
    """One counter per rank in a shared file. Waiting is a busy loop: sleeping would let the core cool down.

    Args:
        path: File of :func:`create_rendezvous`.
        rank: Rank of this process.
        ranks: Number of ranks that meet.
    """

    def __init__(self, path: Path, rank: int, ranks: int) -> None:
        with path.open("r+b") as file:
            self._counters = memoryview(mmap.mmap(file.fileno(), ranks * _COUNTER_BYTES)).cast("q")
        self._rank = rank

    def arrive(self) -> None:
        """Say that this rank has got one point further."""
        self._counters[self._rank] += 1

    def all_arrived(self) -> bool:
        """Whether every rank has got as far as this one."""
        return min(self._counters) >= self._counters[self._rank]

    def barrier(self) -> None:
        """Arrive, and wait for the others."""
        self.arrive()
        while not self.all_arrived():
            pass


def create_rendezvous(path: Path, ranks: int) -> None:
    """Write the shared file, all counters at zero."""
    path.write_bytes(bytes(ranks * _COUNTER_BYTES))
