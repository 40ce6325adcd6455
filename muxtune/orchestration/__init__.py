"""Operators inside a stage: subgraphs of several hTasks on two streams (paper section 3.4)."""

from muxtune.orchestration.actions import action_cut
from muxtune.orchestration.clock import (
    MODES,
    Bounds,
    ClockSchedule,
    Mode,
    PlacedLaunch,
    bounds_of,
    replay_clock,
    schedule_clock,
)
from muxtune.orchestration.list_schedule import launch_graph
from muxtune.orchestration.orders import LaunchOrder, check_order, decode_turns, encode_turns
from muxtune.orchestration.segments import LaunchSegment, clock_segments, collectives, left_of
from muxtune.orchestration.streams import Barrier
from muxtune.orchestration.subgraphs import Cut, Sort, Subgraph, cut
from muxtune.orchestration.timed_subgraphs import LaunchGraph

__all__ = [
    "MODES",
    "Barrier",
    "Bounds",
    "ClockSchedule",
    "Cut",
    "LaunchGraph",
    "LaunchOrder",
    "LaunchSegment",
    "Mode",
    "PlacedLaunch",
    "Sort",
    "Subgraph",
    "action_cut",
    "bounds_of",
    "check_order",
    "clock_segments",
    "collectives",
    "cut",
    "decode_turns",
    "encode_turns",
    "launch_graph",
    "left_of",
    "replay_clock",
    "schedule_clock",
]
