"""Optimizer step of one task on one rank of a stage."""

from __future__ import annotations

from muxtune.graph.nodes import Node, StageGraph
from muxtune.model import DTYPE_BYTES, ModelSpec
from muxtune.operators import Operator
from muxtune.peft import Layers, PeftSpec, stage_attachments
from muxtune.placement import Route


def step_graph(
    model: ModelSpec,
    layers: Layers,
    peft: PeftSpec,
    *,
    tp: int = 1,
    replicas: Route | None = None,
    first: bool = False,
) -> StageGraph[Node]:
    """Sums of the gradients over the ranks, then the optimizer; nothing where the stage has no tensor of it.

    Of some tensors each tensor-parallel rank has a part of the gradient; the replicas have a part of all
    gradients.

    Args:
        model: The backbone, whole.
        layers: Layers of the stage.
        peft: The task's method.
        tp: Tensor-parallel ranks.
        replicas: Links between the ranks that have the same part of the backbone; None if there is one.
        first: Whether the stage begins with the embedding.
    """
    attached = stage_attachments(model.shard(tp), layers, peft, first=first)
    tensors = sum(n * len(each.tensors) for each, n in attached)
    parameters = sum(n * each.parameters for each, n in attached)
    partial = sum(n * each.partial_parameters for each, n in attached)
    if not tensors:
        return StageGraph((), tp)
    element_bytes = max(model.dtype_bytes, DTYPE_BYTES["float32"])  # adapters have float32 or better
    nodes: list[Node] = []
    dp = replicas.ranks if replicas else 1
    for elements, ranks, route in ((partial, tp, None), (parameters, dp, replicas)):
        if ranks > 1:
            deps = (len(nodes) - 1,) if nodes else ()
            op = Operator("all_reduce", (elements * element_bytes, ranks), route)
            nodes.append(Node(op, "communication", deps))
    deps = (len(nodes) - 1,) if nodes else ()
    nodes.append(Node(Operator("optimizer", (tensors, parameters)), "adapter", deps))
    return StageGraph(((tuple(nodes), 1),), tp)
