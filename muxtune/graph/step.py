"""Optimizer step of one task on one rank of a stage."""

from __future__ import annotations

from muxtune.graph.nodes import Node, StageGraph
from muxtune.graph.operators import Operator
from muxtune.graph.peft import attachments
from muxtune.model import DTYPE_BYTES, ModelSpec
from muxtune.placement import Route
from muxtune.tasks import LoraSpec


def step_graph(
    model: ModelSpec, layers: int, lora: LoraSpec, *, tp: int = 1, replicas: Route | None = None
) -> StageGraph[Node]:
    """Sums of the gradients over the ranks, then the optimizer.

    Of every pair, one factor is whole on each tensor-parallel rank, which has a part of its gradient; the
    replicas have a part of all gradients.

    Args:
        model: The backbone, whole.
        layers: Layers of the stage.
        lora: The task's adapter.
        tp: Tensor-parallel ranks.
        replicas: Links between the ranks that have the same part of the backbone; None if there is one.
    """
    attached = attachments(model.shard(tp), lora)
    parameters = layers * sum(each.adapter.parameters(each.base) for each in attached)
    whole = layers * sum(each.adapter.whole_parameters(each.base) for each in attached)
    element_bytes = max(model.dtype_bytes, DTYPE_BYTES["float32"])  # adapters have float32 or better
    nodes: list[Node] = []
    dp = replicas.ranks if replicas else 1
    for elements, ranks, route in ((whole, tp, None), (parameters, dp, replicas)):
        if ranks > 1:
            deps = (len(nodes) - 1,) if nodes else ()
            op = Operator("all_reduce", (elements * element_bytes, ranks), route)
            nodes.append(Node(op, "communication", deps))
    deps = (len(nodes) - 1,) if nodes else ()
    nodes.append(Node(Operator("optimizer", (2 * layers * len(attached), parameters)), "adapter", deps))
    return StageGraph(((tuple(nodes), 1),), tp)
