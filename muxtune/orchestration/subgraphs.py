"""An hTask's operators cut into what is launched at once (paper section 3.4).

The graph of an action is cut at communication operators and at adapters. What lies between runs as a unit: a
subgraph of one sort, whose nodes need nobody's result in between.

Two nodes of a stream may share a subgraph if the same nodes of the other stream come before both, and the
same come after both. Then putting them together makes nobody wait longer for the other stream, and it cannot
close a cycle: what lies between two such nodes has the same nodes before and after it too. Inside such a
class the two sorts of the compute stream take turns as seldom as their dependencies allow.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

from muxtune.graph import Launching, StageGraph, TimedNode

Sort = Literal["compute", "communicate", "adapter"]

COMPUTE, COMMUNICATION = 0, 1
"""Streams by number."""


@dataclass(frozen=True, slots=True)
class Subgraph:
    """A unit of launch."""

    sort: Sort
    nodes: tuple[int, ...]
    """Positions in the expanded graph, in the order in which they run."""
    deps: tuple[int, ...]
    """Subgraphs that it waits for, without those that others of them wait for; all are earlier."""


@dataclass(frozen=True)
class Cut:
    """The subgraphs of a graph, whatever its nodes take; equal graphs share one."""

    subgraphs: tuple[Subgraph, ...]
    deps: tuple[tuple[int, ...], ...]
    """Nodes that each node of the expanded graph waits for."""
    leaves: tuple[bool, ...]
    """Whether nothing of the action waits for a node's results, for the same nodes."""

    @cached_property
    def streams(self) -> tuple[int, ...]:
        """Stream of each subgraph, :data:`COMPUTE` or :data:`COMMUNICATION`."""
        return tuple(COMMUNICATION if each.sort == "communicate" else COMPUTE for each in self.subgraphs)

    @cached_property
    def followers(self) -> tuple[tuple[int, ...], ...]:
        """Subgraphs that wait for each."""
        return tuple(map(tuple, _reversed([each.deps for each in self.subgraphs])))

    @cached_property
    def waiting(self) -> tuple[int, ...]:
        """Number of subgraphs that each waits for."""
        return tuple(len(each.deps) for each in self.subgraphs)

    @cached_property
    def chained(self) -> bool:
        """Whether each subgraph waits for the one before it, so that nothing overlaps."""
        return all(each.deps == ((i - 1,) if i else ()) for i, each in enumerate(self.subgraphs))


def cut(graph: StageGraph[TimedNode], adapters: Launching = "grouped") -> Cut:
    """Cut the graph of an action at communication operators and adapters.

    Args:
        graph: Nodes of both streams.
        adapters: All that are ready together in one launch, or one launch for each node.
    """
    parts = tuple(
        (tuple(_Shape(_sort(node), node.deps, node.leaf) for node in part), n) for part, n in graph.parts
    )
    return _cut(StageGraph(parts), adapters)


@dataclass(frozen=True, slots=True)
class _Shape:
    """What cutting looks at."""

    sort: Sort
    deps: tuple[int, ...]
    leaf: bool

    def after(self, deps: tuple[int, ...]) -> _Shape:
        return _Shape(self.sort, deps, self.leaf)


def _sort(node: TimedNode) -> Sort:
    if node.stream == "communication":
        return "communicate"
    return "adapter" if node.role == "adapter" else "compute"


@lru_cache(maxsize=1024)  # the hTasks of a search differ in times, rarely in shape
def _cut(graph: StageGraph[_Shape], adapters: Launching) -> Cut:
    nodes = graph.expand()
    deps = tuple(node.deps for node in nodes)
    classes: dict[tuple[bool, int, int], list[int]] = {}
    on_link = [node.sort == "communicate" for node in nodes]
    before, after = _across(deps, on_link), _across(_reversed(deps), on_link, backwards=True)
    for i, key in enumerate(zip(on_link, before, after, strict=True)):
        classes.setdefault(key, []).append(i)
    groups: list[list[int]] = []
    for members in classes.values():
        for group in _batches(members, nodes):
            single = adapters == "separate" and nodes[group[0]].sort == "adapter"
            groups += [[node] for node in group] if single else [group]
    return Cut(_in_order(groups, nodes), deps, tuple(node.leaf for node in nodes))


def _across(deps: Sequence[Sequence[int]], on_link: Sequence[bool], *, backwards: bool = False) -> list[int]:
    """Nodes of the other stream that each node waits for, at any distance, as bits."""
    waited: tuple[list[int], list[int]] = ([0] * len(deps), [0] * len(deps))  # nodes of each stream
    for node in reversed(range(len(deps))) if backwards else range(len(deps)):
        for stream, reached in enumerate(waited):
            bits = 0
            for dep in deps[node]:
                bits |= reached[dep]
                if on_link[dep] == stream:
                    bits |= 1 << dep
            reached[node] = bits
    return [waited[not link][node] for node, link in enumerate(on_link)]


def _reversed(deps: Sequence[Sequence[int]]) -> list[list[int]]:
    """Nodes that wait for each."""
    followers: list[list[int]] = [[] for _ in deps]
    for node, waited in enumerate(deps):
        for dep in waited:
            followers[dep].append(node)
    return followers


def _batches(members: Sequence[int], nodes: Sequence[_Shape]) -> list[list[int]]:
    """Nodes of a class in as few batches of one sort as their dependencies allow."""
    sorts = sorted({nodes[node].sort for node in members}, reverse=True)  # compute first
    if len(sorts) == 1:
        return [list(members)]
    return min((_taking_turns(members, nodes, first) for first in sorts), key=len)


def _taking_turns(members: Sequence[int], nodes: Sequence[_Shape], first: Sort) -> list[list[int]]:
    """Batches of both sorts in turn, each as long as it can get; members come in an order that can run."""
    inside = set(members)
    batch_of: dict[int, int] = {}
    starts = {first: 0, ("adapter" if first == "compute" else "compute"): 1}
    for node in members:  # the earliest batch of its sort, given those that it waits for
        earliest = starts[nodes[node].sort]
        for dep in nodes[node].deps:
            if dep in inside:
                same = nodes[dep].sort == nodes[node].sort
                earliest = max(earliest, batch_of[dep] + (not same))
        batch_of[node] = earliest
    batches: dict[int, list[int]] = {}
    for node in members:
        batches.setdefault(batch_of[node], []).append(node)
    return [batches[number] for number in sorted(batches)]


def _in_order(groups: Sequence[Sequence[int]], nodes: Sequence[_Shape]) -> tuple[Subgraph, ...]:
    """Number subgraphs so that all wait for earlier ones, nearest to the order of their nodes."""
    group_of = {node: number for number, group in enumerate(groups) for node in group}
    waits = [
        {group_of[dep] for node in group for dep in nodes[node].deps} - {number}
        for number, group in enumerate(groups)
    ]
    order = _topological(waits, [group[0] for group in groups])
    position = {number: i for i, number in enumerate(order)}
    deps = _nearest([[position[dep] for dep in waits[number]] for number in order])
    return tuple(
        Subgraph(nodes[groups[number][0]].sort, tuple(groups[number]), nearest)
        for number, nearest in zip(order, deps, strict=True)
    )


def _nearest(waits: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    """Dependencies of each that none of its other dependencies waits for; all wait for earlier ones."""
    behind: list[int] = []  # of each, all that it waits for at any distance, as bits
    nearest: list[tuple[int, ...]] = []
    for waited in waits:
        bits = 0
        kept: list[int] = []
        for dep in sorted(waited, reverse=True):
            if not bits >> dep & 1:
                kept.append(dep)
                bits |= behind[dep] | 1 << dep
        behind.append(bits)
        nearest.append(tuple(reversed(kept)))
    return tuple(nearest)


def _topological(waits: Sequence[set[int]], keys: Sequence[int]) -> list[int]:
    """An order in which all wait for earlier ones; of those that can come next, the lowest key."""
    left = [len(waited) for waited in waits]
    followers = _reversed([sorted(waited) for waited in waits])
    ready = [(keys[i], i) for i, count in enumerate(left) if not count]
    heapq.heapify(ready)
    order: list[int] = []
    while ready:
        _, number = heapq.heappop(ready)
        order.append(number)
        for follower in followers[number]:
            left[follower] -= 1
            if not left[follower]:
                heapq.heappush(ready, (keys[follower], follower))
    assert len(order) == len(waits), "classes of nodes form no cycle"
    return order
