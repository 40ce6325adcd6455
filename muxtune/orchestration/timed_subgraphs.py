"""Subgraphs with times: of one hTask, and of all that share a clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from muxtune.orchestration.subgraphs import COMMUNICATION, COMPUTE, Cut

_TINY_S = 1e-12
"""Instead of no time at all, to divide by."""


@dataclass(frozen=True)
class LaunchGraph:
    """The subgraphs of one hTask's action, with what each takes alone on the device.

    Lists have a value per subgraph.
    """

    cut: Cut
    seconds: tuple[float, ...]
    operator_path_s: float
    """Longest path through single operators, as if each stream ran any number of them at once."""
    alone: tuple[int, ...] = ()
    """Subgraphs in the order of the best schedule that the hTask has alone."""

    @cached_property
    def work_s(self) -> tuple[float, float]:
        """Seconds on the compute stream, and on the communication stream."""
        timed = list(zip(self.seconds, self.cut.streams, strict=True))
        return sum(s for s, on in timed if on == COMPUTE), sum(s for s, on in timed if on == COMMUNICATION)

    @cached_property
    def critical_path_s(self) -> float:
        """Longest path through subgraphs; no schedule of the operators is shorter.

        What of a path lies between two communications has to come after the one and before the other, all of
        it, and on one stream: there it takes the sum, also where single operators depend less on each other.
        """
        ends_s: list[float] = []
        for seconds, each in zip(self.seconds, self.cut.subgraphs, strict=True):
            ends_s.append(seconds + max([ends_s[dep] for dep in each.deps], default=0.0))
        return max(ends_s, default=0.0)

    @cached_property
    def remaining_s(self) -> Sequence[float]:
        """Longest path from the start of each to the end."""
        return self._longest(self.seconds)

    @cached_property
    def communication_share(self) -> Sequence[float]:
        """Longest such path where only communication counts, as a share of the hTask's longest."""
        on_link = [
            s if on == COMMUNICATION else 0.0 for s, on in zip(self.seconds, self.cut.streams, strict=True)
        ]
        left_s = self._longest(on_link)
        all_s = max(left_s, default=0.0)
        return [each / all_s for each in left_s] if all_s else left_s

    @cached_property
    def communication_rate(self) -> Sequence[float]:
        """Seconds of the communication that each leads to, per second of computing until it can start."""
        computing_s, next_s = [0.0] * len(self.seconds), [0.0] * len(self.seconds)
        rates = [0.0] * len(self.seconds)
        for i in reversed(range(len(rates))):
            if self.cut.streams[i] == COMMUNICATION:
                next_s[i] = self.seconds[i]
            else:
                followers = self.cut.followers[i]
                computing_s[i] = self.seconds[i]
                if followers:
                    via = max(followers, key=rates.__getitem__)
                    computing_s[i] += computing_s[via]
                    next_s[i] = next_s[via]
            rates[i] = next_s[i] / max(computing_s[i], _TINY_S)
        return rates

    def _longest(self, seconds: Sequence[float]) -> Sequence[float]:
        longest = list(seconds)
        for i in reversed(range(len(longest))):
            followers = self.cut.followers[i]
            if followers:
                longest[i] += max([longest[follower] for follower in followers])
        return longest


class ClockSubgraphs:
    """All subgraphs of the hTasks that share a clock, hTask by hTask; lists have a value for each."""

    def __init__(self, graphs: Sequence[LaunchGraph]) -> None:
        self.graphs = tuple(graphs)
        self.firsts: list[int] = []
        """First subgraph of each hTask."""
        self.seconds: list[float] = []
        self.streams: list[int] = []
        self.waiting: list[int] = []
        """Number of subgraphs that each waits for."""
        self.followers: list[Sequence[int]] = []
        """Subgraphs that wait for each."""
        for graph in self.graphs:
            first = len(self.seconds)
            self.firsts.append(first)
            self.seconds += graph.seconds
            self.streams += graph.cut.streams
            self.waiting += graph.cut.waiting
            self.followers += [[first + each for each in found] for found in graph.cut.followers]

    def __len__(self) -> int:
        return len(self.seconds)

    @cached_property
    def owners(self) -> Sequence[int]:
        """HTask of each."""
        return [position for position, graph in enumerate(self.graphs) for _ in graph.seconds]

    def htask(self, position: int) -> range:
        """Subgraphs of an hTask."""
        return range(self.firsts[position], self.firsts[position] + len(self.graphs[position].seconds))

    def on_stream(self, position: int, stream: int) -> list[int]:
        """Subgraphs of an hTask on one stream."""
        return [item for item in self.htask(position) if self.streams[item] == stream]

    def work_s(self, stream: int) -> float:
        """Seconds of all hTasks on a stream."""
        return sum(graph.work_s[stream] for graph in self.graphs)
