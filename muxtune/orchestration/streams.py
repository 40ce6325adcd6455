"""Two streams that play launches in order: when does each run, alone and under contention?

While both streams are busy, each of the two kernels runs at rate ``1 / (1 + contention)``. Both slow down
alike, so nothing changes its place: a schedule under contention is the one without, with every second in
which both streams are busy stretched to ``1 + contention`` seconds. What takes T seconds, O of them
overlapped, takes ``T + contention * O``.

An order never leaves both streams idle, so C seconds of computing and M of communication overlap for
``C + M - T``: the shortest schedule without contention is the shortest under any contention up to 1, and from
there on nothing is shorter than no overlap.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from muxtune.orchestration.timed_subgraphs import ClockSubgraphs

Barrier = Literal["launch", "htask", "none"]
"""What ends on both streams before the next one begins: every launch, every hTask, or nothing."""


@dataclass(frozen=True, slots=True)
class Played:
    """Starts and ends of a clock's subgraphs."""

    starts_s: list[float]
    ends_s: list[float]

    @property
    def seconds(self) -> float:
        """Seconds until all have run."""
        return max(self.ends_s, default=0.0)


def play(clock: ClockSubgraphs, order: Iterable[int], barrier: Barrier = "none") -> Played:
    """Run all subgraphs without contention, each as soon as its stream is free and its inputs are there.

    Args:
        clock: The subgraphs to run.
        order: Each subgraph after all that it waits for.
        barrier: Unit that ends on both streams before the next one begins.
    """
    ready_s = [0.0] * len(clock)
    ends_s = ready_s.copy()
    free_s = [0.0, 0.0]
    owner = -1
    for item in order:
        if barrier == "launch" or (barrier == "htask" and clock.owners[item] != owner):
            free_s = [max(free_s)] * 2
            owner = clock.owners[item]
        stream = clock.streams[item]
        start_s = ready_s[item] = max(ready_s[item], free_s[stream])
        end_s = ends_s[item] = free_s[stream] = start_s + clock.seconds[item]
        for follower in clock.followers[item]:
            ready_s[follower] = max(ready_s[follower], end_s)
    return Played(ready_s, ends_s)


def contended(clock: ClockSubgraphs, alone: Played, contention: float) -> Played:
    """Times under contention from those without."""
    if not contention:
        return alone
    events = [(time_s, stream, 1) for time_s, stream in zip(alone.starts_s, clock.streams, strict=True)]
    events += [(time_s, stream, -1) for time_s, stream in zip(alone.ends_s, clock.streams, strict=True)]
    stretched_s: dict[float, float] = {}
    running = [0, 0]
    last_s = overlapped_s = 0.0
    for time_s, stream, change in sorted(events):
        if running[0] > 0 and running[1] > 0:
            overlapped_s += time_s - last_s
        stretched_s[time_s] = time_s + contention * overlapped_s
        running[stream] += change
        last_s = time_s

    def at(times_s: Sequence[float]) -> list[float]:
        return [stretched_s[time_s] for time_s in times_s]

    return Played(at(alone.starts_s), at(alone.ends_s))
