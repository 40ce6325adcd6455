"""Prices on a graph: what each node takes, alone on the device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Protocol, Self

from muxtune.graph.layer import Launch
from muxtune.graph.nodes import Node, StageGraph, TimedNode
from muxtune.graph.operators import FWD_ONLY, Operator, Phase


class Prices(Protocol):
    """What a graph asks of operator costs; see :class:`muxtune.costs.CostModel`."""

    def latency_s(self, op: Operator, phase: Phase) -> float:
        """Seconds of one operator."""
        ...

    def group_latency_s(self, ops: Sequence[Operator], phase: Phase) -> float:
        """Seconds of adapters that share a launch."""
        ...

    def action_s(self, operators_s: float, phase: Phase) -> float:
        """Seconds of a whole action whose operators sum up to ``operators_s``."""
        ...

    def shard(self, tp: int) -> Self:
        """Prices of one of ``tp`` tensor-parallel ranks."""
        ...


def node_seconds(node: Node | Launch, prices: Prices, phase: Phase) -> float:
    """Seconds of a node, as often as it runs.

    Args:
        node: Node of a rank, or what it runs.
        prices: Prices for that rank.
        phase: Phase of the action; messages and collectives are the same in both.
    """
    count = node.times if isinstance(node, Launch) else node.count
    if node.group:
        return count * prices.group_latency_s(node.group, phase)
    return count * prices.latency_s(node.op, "fwd" if node.op.kind in FWD_ONLY else phase)


def time_graph(graph: StageGraph[Node], prices: Prices, phase: Phase) -> StageGraph[TimedNode]:
    """Graph of the same action with seconds, which add up as in :class:`muxtune.costs.compose.ActionPrices`.

    What an action costs beyond its operators is a node before all others. Sizes that an average mixes are one
    node.

    Args:
        graph: Graph of one action.
        prices: Prices for the whole backbone.
        phase: Phase of the action.
    """
    prices = prices if graph.tp == 1 else prices.shard(graph.tp)
    parts = tuple((_timed(nodes, prices, phase), repeats) for nodes, repeats in graph.parts)
    operators_s = sum(repeats * node.seconds for nodes, repeats in parts for node in nodes)
    fixed_s = prices.action_s(operators_s, phase) - operators_s
    if fixed_s > 0:
        parts = (((TimedNode("action", "compute", fixed_s, role="host"),), 1), *parts)
    return StageGraph(parts, graph.tp)


def _timed(nodes: Iterable[Node], prices: Prices, phase: Phase) -> tuple[TimedNode, ...]:
    timed: list[TimedNode] = []
    places: list[int] = []
    before: Node | None = None
    for node in nodes:
        seconds = node_seconds(node, prices, phase)
        if before is not None and _mixed(before, node):
            timed[-1] = replace(timed[-1], seconds=timed[-1].seconds + seconds)
        else:
            deps = tuple(dict.fromkeys(places[dep] for dep in node.deps))
            label = node.op.kind if node.task is None else f"{node.op.kind} {node.task}"
            timed.append(TimedNode(label, node.stream, seconds, deps, node.role, node.leaf))
        places.append(len(timed) - 1)
        before = node
    return tuple(timed)


def _mixed(before: Node, node: Node) -> bool:
    """Whether two nodes are sizes of one operator."""
    return node.role != "adapter" and node.op.kind == before.op.kind and node.deps == before.deps
