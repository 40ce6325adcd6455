"""What the actions of a stage cost: prices on the graphs of :mod:`muxtune.graph`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from muxtune.costs.base import CostModel
from muxtune.graph import (
    Launching,
    Node,
    frozen_products,
    message_bytes,
    node_seconds,
    part_graph,
    stage_graph,
    stage_parts,
    step_graph,
)
from muxtune.graph.layer import own_launches, stream_launches
from muxtune.graph.microbatch_work import MicrobatchWork
from muxtune.graph.stage import Part
from muxtune.model import ModelSpec
from muxtune.operators import Operator, Phase
from muxtune.peft import Layers, PeftSpec
from muxtune.placement import Route

__all__ = [
    "ActionPrices",
    "MicrobatchWork",
    "StreamSeconds",
    "Weighted",
    "frozen_products",
    "message_bytes",
    "p2p_seconds",
    "stage_operators",
    "step_seconds",
]

Weighted = tuple[Operator, float]
"""An operator, and how often it runs."""

StreamSeconds = dict[tuple[object, ...], float]
"""Seconds of what a layer runs that depends on the length of the stream alone."""


def stage_operators(
    model: ModelSpec,
    layers: Layers,
    *,
    first: bool,
    last: bool,
    work: MicrobatchWork,
    phase: Phase,
    tp: int = 1,
) -> list[Weighted]:
    """Operators of one action of a stage, without the messages from and to its neighbours."""
    graph = stage_graph(model, layers, first=first, last=last, work=work, phase=phase, tp=tp)
    return _weighted((node, repeats) for node, repeats in graph if node.op.kind != "message")


class ActionPrices:
    """What one micro-batch costs in one phase on any stage; every part of a stage is priced once.

    Args:
        costs: Costs of the device, for the whole backbone.
        model: The backbone, whole.
        work: The micro-batch.
        phase: ``fwd`` for an F, ``bwd`` for a B.
        tp: Tensor-parallel ranks.
        adapters: How those of several tasks at one base op are launched.
        streams: What is known of streams of some length, whatever their tasks; several prices may share it
            if they have the same costs and backbone.

    Raises:
        SpecError: The backbone cannot be split into so many parts.
    """

    def __init__(
        self,
        costs: CostModel,
        model: ModelSpec,
        work: MicrobatchWork,
        phase: Phase,
        *,
        tp: int = 1,
        adapters: Launching = "grouped",
        streams: StreamSeconds | None = None,
    ) -> None:
        self._costs = costs if tp == 1 else costs.shard(tp)
        self._model = model
        self._work = work
        self._phase = phase
        self._tp = tp
        self._adapters = adapters
        self._parts_s: dict[Part, float] = {}
        self._streams = {} if streams is None else streams

    def seconds(self, layers: Layers, *, first: bool, last: bool) -> float:
        """Seconds of the action on a stage: its operators, and the messages from and to its neighbours.

        Args:
            layers: Layers that the stage holds, at least one.
            first: Whether the stage begins with the embedding.
            last: Whether it ends with the head.
        """
        parts = stage_parts(self._model, layers, self._work.pefts, first=first, last=last, phase=self._phase)
        return self._costs.action_s(sum(n * self._part_s(part) for part, n in parts if n), self._phase)

    def _part_s(self, part: Part) -> float:
        seconds = self._parts_s.get(part)
        if seconds is None:
            if part.kind == "layer":
                seconds = self._stream_s(part.trained) + self._own_s(part)
            else:
                nodes = part_graph(
                    part, self._model, self._work, self._phase, tp=self._tp, adapters=self._adapters
                )
                seconds = sum([node_seconds(node, self._costs, self._phase) for node in nodes])
            self._parts_s[part] = seconds
        return seconds

    def _stream_s(self, trained: int | None) -> float:
        """What of a layer depends on the length of the stream alone."""
        key = self._work.tokens, self._phase, self._tp, self._adapters, trained
        seconds = self._streams.get(key)
        if seconds is None:
            launches = stream_launches(
                self._model, self._work.tokens, self._phase, tp=self._tp, trained=trained
            )
            seconds = sum([node_seconds(each, self._costs, self._phase) for each in launches])
            self._streams[key] = seconds
        return seconds

    def _own_s(self, part: Part) -> float:
        """What of a layer depends on the micro-batch's sequences and tasks."""
        launches = own_launches(
            self._model,
            self._work,
            self._phase,
            tp=self._tp,
            layer=part.layer,
            trained=part.trained,
            adapters=self._adapters,
        )
        return sum([node_seconds(each, self._costs, self._phase) for each in launches])


def step_seconds(
    costs: CostModel,
    model: ModelSpec,
    layers: Layers,
    peft: PeftSpec,
    *,
    tp: int = 1,
    replicas: Sequence[Route] = (),
    first: bool = False,
) -> float:
    """Seconds of one task's optimizer step on a stage, with the sums of its gradients over the ranks.

    Args:
        costs: Costs of the device, for the whole backbone.
        model: The backbone, whole.
        layers: Layers of the stage.
        peft: The task's method.
        tp: Tensor-parallel ranks.
        replicas: Links between the replicas of each shard, see
            :meth:`muxtune.placement.Placement.replica_routes`; the slowest shard decides. None if there is
            one replica.
        first: Whether the stage begins with the embedding.
    """
    prices = costs if tp == 1 else costs.shard(tp)
    graphs = [
        step_graph(model, layers, peft, tp=tp, replicas=route, first=first) for route in replicas or (None,)
    ]
    return max(
        sum(repeats * node_seconds(node, prices, "fwd") for node, repeats in graph) for graph in graphs
    )


def p2p_seconds(costs: CostModel, model: ModelSpec, tokens: int, routes: Sequence[Route]) -> float:
    """Seconds until a micro-batch's hidden states, or their gradients, have reached the neighbour.

    Args:
        costs: Costs of the device.
        model: The backbone.
        tokens: Tokens of the micro-batch.
        routes: Links between neighbours, see :meth:`muxtune.placement.Placement.message_routes`; the slowest
            decides. None if there is one stage.
    """
    bytes_ = message_bytes(model, tokens)
    return max((costs.latency_s(Operator("p2p", (bytes_,), route), "fwd") for route in routes), default=0.0)


def _weighted(nodes: Iterable[tuple[Node, int]]) -> list[Weighted]:
    """Equal operators counted together."""
    counts: dict[Operator, float] = {}
    for node, repeats in nodes:
        for op in node.operators:
            counts[op] = counts.get(op, 0.0) + node.count * repeats
    return list(counts.items())
