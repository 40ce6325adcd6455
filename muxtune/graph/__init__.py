"""Operator graphs of pipeline stages; one definition for costs, orchestration and simulator."""

from muxtune.graph.layer import Launching, frozen_products, layer_graph
from muxtune.graph.nodes import Node, Role, StageGraph, Stream, TimedNode
from muxtune.graph.peft import Adapter, Aggregate, Attachment, BaseOp, Dispatch, attachments, base_ops
from muxtune.graph.stage import message_bytes, part_graph, stage_graph, stage_parts
from muxtune.graph.step import step_graph
from muxtune.graph.timed import Prices, node_seconds, time_graph

__all__ = [
    "Adapter",
    "Aggregate",
    "Attachment",
    "BaseOp",
    "Dispatch",
    "Launching",
    "Node",
    "Prices",
    "Role",
    "StageGraph",
    "Stream",
    "TimedNode",
    "attachments",
    "base_ops",
    "frozen_products",
    "layer_graph",
    "message_bytes",
    "node_seconds",
    "part_graph",
    "stage_graph",
    "stage_parts",
    "step_graph",
    "time_graph",
]
