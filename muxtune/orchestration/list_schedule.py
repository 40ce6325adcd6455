"""List scheduling on two streams: whenever one is free, it takes the most urgent subgraph that is ready."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from heapq import heappop, heappush
from math import inf

from muxtune.graph import Launching, StageGraph, TimedNode
from muxtune.orchestration.subgraphs import COMMUNICATION, COMPUTE, cut
from muxtune.orchestration.timed_subgraphs import ClockSubgraphs, LaunchGraph

RULES: tuple[Callable[[LaunchGraph], Sequence[float]], ...] = (
    lambda graph: graph.communication_share,
    lambda graph: graph.communication_rate,
    lambda graph: graph.remaining_s,
)
"""What makes a subgraph urgent; each rule wins some clocks.

The longest remaining path is the classical rule, and right where one hTask dominates. Otherwise it lets the
longer ones run ahead until all are as long, and what hides the communication of the last is used up. The
first rule makes all of them advance in proportion and end together; the second keeps the link supplied.
"""

_REACHED = 1 + 1e-12
"""Factor on a lower bound within which a schedule has reached it; the two are summed in different orders."""


def dispatch(clock: ClockSubgraphs, urgency: Sequence[float]) -> tuple[list[int], float]:
    """List scheduling without contention, in O(n log n).

    Args:
        clock: What there is to run.
        urgency: Urgency of each subgraph; the highest goes first, the earlier one of equals.

    Returns:
        Subgraphs in the order of their starts, communication first where two start together; and the seconds
        until all have run.
    """
    count = len(clock)
    by_rank = sorted(range(count), key=lambda item: -urgency[item])
    rank = [0] * count
    for position, item in enumerate(by_rank):
        rank[item] = position
    seconds, streams, followers, waiting = clock.seconds, clock.streams, clock.followers, clock.waiting.copy()
    ready: tuple[list[int], list[int]] = ([], [])
    for position, item in enumerate(by_rank):  # ascending ranks are a heap
        if not waiting[item]:
            ready[streams[item]].append(position)
    order: list[int] = []
    running = [-1, -1]
    ends_s = [inf, inf]
    now_s, ended_s = 0.0, -1.0
    for _ in range(count):
        if ends_s[COMPUTE] > ended_s < ends_s[COMMUNICATION]:  # all that end now have ended
            for stream in (COMMUNICATION, COMPUTE):
                if ready[stream] and running[stream] < 0:
                    item = running[stream] = by_rank[heappop(ready[stream])]
                    ends_s[stream] = now_s + seconds[item]
                    order.append(item)
        ended = COMMUNICATION if ends_s[COMMUNICATION] <= ends_s[COMPUTE] else COMPUTE
        now_s = ended_s = ends_s[ended]
        for follower in followers[running[ended]]:
            waiting[follower] -= 1
            if not waiting[follower]:
                heappush(ready[streams[follower]], rank[follower])
        running[ended] = -1
        ends_s[ended] = inf
    return order, now_s


def list_schedules(clock: ClockSubgraphs, lower_s: float) -> Iterator[tuple[list[int], float]]:
    """A schedule by each of :data:`RULES`, as of :func:`dispatch`, until one reaches a lower bound."""
    for rule in RULES:
        order, seconds = dispatch(clock, [each for graph in clock.graphs for each in rule(graph)])
        yield order, seconds
        if seconds <= lower_s * _REACHED:
            return


def launch_graph(graph: StageGraph[TimedNode], adapters: Launching = "grouped") -> LaunchGraph:
    """Cut the graph of an action.

    Args:
        graph: One hTask's forward or backward on a stage.
        adapters: All that are ready together in one launch, or one launch for each node.
    """
    shape = cut(graph, adapters)
    node_s = [node.seconds for part, repeats in graph.parts for _ in range(repeats) for node in part]
    ends_s: list[float] = []
    for seconds, deps in zip(node_s, shape.deps, strict=True):
        ends_s.append(seconds + (max([ends_s[dep] for dep in deps]) if deps else 0.0))
    found = LaunchGraph(
        shape,
        tuple([sum([node_s[node] for node in each.nodes]) for each in shape.subgraphs]),
        max(ends_s, default=0.0),
        tuple(range(len(shape.subgraphs))),
    )
    if shape.chained:
        return found
    lower_s = max(*found.work_s, found.critical_path_s)
    best, _ = min(list_schedules(ClockSubgraphs((found,)), lower_s), key=lambda schedule: schedule[1])
    return replace(found, alone=tuple(best))
