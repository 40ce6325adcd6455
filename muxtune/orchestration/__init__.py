"""Operators inside a stage: subgraphs of several hTasks on two streams (paper section 3.4)."""

from muxtune.orchestration.clock import (
    MODES,
    Bounds,
    ClockSchedule,
    Launch,
    Mode,
    bounds_of,
    replay_clock,
    schedule_clock,
)
from muxtune.orchestration.launches import LaunchGraph
from muxtune.orchestration.list_schedule import launch_graph
from muxtune.orchestration.orders import LaunchOrder, decode_turns, encode_turns
from muxtune.orchestration.subgraphs import Cut, Sort, Subgraph, cut

__all__ = [
    "MODES",
    "Bounds",
    "ClockSchedule",
    "Cut",
    "Launch",
    "LaunchGraph",
    "LaunchOrder",
    "Mode",
    "Sort",
    "Subgraph",
    "bounds_of",
    "cut",
    "decode_turns",
    "encode_turns",
    "launch_graph",
    "replay_clock",
    "schedule_clock",
]
