"""Schedules: the actions of every stage in order, how long they take, and traces of them."""

from muxtune.schedule.actions import Action, ClockActions, Kind, build_schedule, clocks_of
from muxtune.schedule.check import check_schedule
from muxtune.schedule.pipeline_order import (
    Template,
    check_own_order,
    clocks_in_flight,
    inject,
    injection_order,
    iteration_clocks,
    shared_clocks,
)
from muxtune.schedule.recurrence import (
    ClockKind,
    ClockTimes,
    StageTimes,
    evaluate_schedule,
    injected_iteration_s,
    iteration_work_s,
    lower_bound_s,
    makespan_s,
    steady_iteration_s,
)
from muxtune.schedule.trace import (
    COMMUNICATION,
    COMPUTE,
    ActionSpan,
    OperatorSpan,
    iteration_ends_s,
    load_trace,
    save_trace,
    track_name,
)

__all__ = [
    "COMMUNICATION",
    "COMPUTE",
    "Action",
    "ActionSpan",
    "ClockActions",
    "ClockKind",
    "ClockTimes",
    "Kind",
    "OperatorSpan",
    "StageTimes",
    "Template",
    "build_schedule",
    "check_own_order",
    "check_schedule",
    "clocks_in_flight",
    "clocks_of",
    "evaluate_schedule",
    "inject",
    "injected_iteration_s",
    "injection_order",
    "iteration_clocks",
    "iteration_ends_s",
    "iteration_work_s",
    "load_trace",
    "lower_bound_s",
    "makespan_s",
    "save_trace",
    "shared_clocks",
    "steady_iteration_s",
    "track_name",
]
