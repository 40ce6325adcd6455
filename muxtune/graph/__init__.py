"""Operator graphs of pipeline stages; one definition for costs, orchestration and simulator."""

from muxtune.graph.nodes import Node, Role, StageGraph, Stream, TimedNode

__all__ = ["Node", "Role", "StageGraph", "Stream", "TimedNode"]
