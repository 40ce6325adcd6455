"""The cut of an action from the plan alone: what its subgraphs are depends on no time and on no data."""

from __future__ import annotations

from muxtune.graph import Launching, StageGraph, stage_graph
from muxtune.graph.microbatch_work import MicrobatchWork
from muxtune.graph.nodes import Node, TimedNode
from muxtune.graph.operators import Phase
from muxtune.model import ModelSpec
from muxtune.orchestration.subgraphs import Cut, cut
from muxtune.peft import Layers, Specs


def action_cut(
    model: ModelSpec,
    layers: Layers,
    *,
    first: bool,
    last: bool,
    pefts: Specs,
    tokens: int,
    phase: Phase,
    tp: int,
    adapters: Launching = "grouped",
) -> Cut:
    """Subgraphs of an hTask's forward or backward on a stage.

    Sequences and targets only change what a node takes, so a nominal micro-batch stands for all: one
    sequence, one target.

    Args:
        model: The backbone, whole.
        layers: Layers that the stage holds.
        first: Whether the stage begins with the embedding.
        last: Whether it ends with the head.
        pefts: Methods of the hTask's tasks, in their order.
        tokens: Tokens of a micro-batch.
        phase: Forward or backward.
        tp: Ranks that share the stage.
        adapters: How those of several tasks at one base op are launched.

    Raises:
        SpecError: The backbone cannot be split into so many parts.
    """
    work = MicrobatchWork(
        tokens=tokens,
        task_tokens=(max(1, tokens // len(pefts)),) * len(pefts),
        pefts=pefts,
        attention=((1.0, 1, tokens),),
        targets=1.0,
    )
    graph = stage_graph(
        model, layers, first=first, last=last, work=work, phase=phase, tp=tp, adapters=adapters
    )
    parts = tuple((tuple(_untimed(node) for node in nodes), repeats) for nodes, repeats in graph.parts)
    return cut(StageGraph(parts, graph.tp), adapters)


def _untimed(node: Node) -> TimedNode:
    return TimedNode(node.op.kind, node.stream, 0.0, node.deps, node.role, node.leaf)
