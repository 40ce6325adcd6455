"""Operator graphs of pipeline stages; one definition for costs, orchestration and simulator."""

from muxtune.graph.layer import Launching, frozen_products, layer_graph
from muxtune.graph.nodes import Node, Role, StageGraph, Stream, TimedNode
from muxtune.graph.stage import Part, message_bytes, part_graph, stage_graph, stage_parts
from muxtune.graph.step import step_graph
from muxtune.graph.timed import Prices, node_seconds, time_graph

__all__ = [
    "Launching",
    "Node",
    "Part",
    "Prices",
    "Role",
    "StageGraph",
    "Stream",
    "TimedNode",
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
