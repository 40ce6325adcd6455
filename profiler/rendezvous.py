"""Processes that start together and end together: each has a pipe that the others write their rank into."""

from __future__ import annotations

import os
import select
import time
from collections import Counter
from pathlib import Path

_SPIN_S = 2e-4
"""Ranks come close to one another, as a rule: so long a look costs less than to fall asleep and cool down.
After it, whoever waits leaves the core to others."""

_READ_BYTES = 1 << 12


class Rendezvous:
    """A rank's own pipe, and the ends of the others'.

    Args:
        folder: Folder of :func:`create_rendezvous`.
        rank: Rank of this process, below 256.
        ranks: Number of ranks that meet.
    """

    def __init__(self, folder: Path, rank: int, ranks: int) -> None:
        # Open for both, so that nobody waits for the other end here, and nobody ever sees it closed.
        pipes = [os.open(_pipe(folder, each), os.O_RDWR | os.O_NONBLOCK) for each in range(ranks)]
        self._own = pipes[rank]
        self._others = [pipe for each, pipe in enumerate(pipes) if each != rank]
        self._name = bytes([rank])
        self._points = 0
        self._seen = Counter[int]({each: 0 for each in range(ranks) if each != rank})

    def arrive(self) -> None:
        """Say that this rank has got one point further."""
        self._points += 1
        for pipe in self._others:
            os.write(pipe, self._name)

    def all_arrived(self) -> bool:
        """Whether every rank has got as far as this one."""
        if self._behind():
            try:
                self._seen.update(os.read(self._own, _READ_BYTES))
            except BlockingIOError:
                return False
        return not self._behind()

    def barrier(self) -> None:
        """Arrive, and wait for the others."""
        self.arrive()
        spin_until_s = time.perf_counter() + _SPIN_S
        while not self.all_arrived():
            if time.perf_counter() > spin_until_s:
                select.select([self._own], [], [])

    def _behind(self) -> bool:
        return any(points < self._points for points in self._seen.values())


def create_rendezvous(folder: Path, ranks: int) -> None:
    """Make a folder with a pipe for each rank."""
    folder.mkdir()
    for rank in range(ranks):
        os.mkfifo(_pipe(folder, rank))


def _pipe(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}"
