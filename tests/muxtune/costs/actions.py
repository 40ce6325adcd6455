"""Prices and operators of single actions and layers, which the product asks for many at once."""

from __future__ import annotations

from collections import Counter

from muxtune.costs import CostModel
from muxtune.costs.compose import ActionPrices, MicrobatchWork, Weighted
from muxtune.graph.layer import layer_graph
from muxtune.model import ModelSpec
from muxtune.operators import Operator, Phase
from muxtune.peft import Layers


def layer_operators(
    model: ModelSpec,
    work: MicrobatchWork,
    phase: Phase,
    *,
    layer: int = 0,
    trained: int | None = None,
    tp: int = 1,
) -> list[Weighted]:
    """Operators of one layer for one micro-batch; arguments as of :func:`muxtune.graph.layer_graph`."""
    counts: Counter[Operator] = Counter()
    for node in layer_graph(model, work, phase, layer=layer, trained=trained, tp=tp):
        for op in node.operators:
            counts[op] += node.count
    return list(counts.items())


def stage_seconds(
    costs: CostModel,
    model: ModelSpec,
    layers: Layers,
    *,
    first: bool,
    last: bool,
    work: MicrobatchWork,
    phase: Phase,
    tp: int = 1,
) -> float:
    """Seconds of one action of a stage: its operators, and the messages from and to its neighbours.

    Args:
        costs: Costs of the device, for the whole backbone.
        model: The backbone, whole.
        layers: Layers that the stage holds, at least one.
        first: Whether the stage begins with the embedding.
        last: Whether it ends with the head.
        work: The micro-batch.
        phase: ``fwd`` for an F, ``bwd`` for a B.
        tp: Tensor-parallel ranks; the seconds are those of one of them, collectives included.
    """
    return ActionPrices(costs, model, work, phase, tp=tp).seconds(layers, first=first, last=last)
