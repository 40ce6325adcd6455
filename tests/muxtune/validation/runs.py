"""Made-up traces of the runtime: the durations of every action are the test's, so the causes are known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from muxtune.plan import Plan, extend_schedule, stage_times
from muxtune.schedule import COMMUNICATION, COMPUTE, Action, ActionSpan

STEADY = (1, 2, 3)
"""Iterations of a run of four that count."""


@dataclass(frozen=True)
class Reality:
    """How a run differs from its plan; each takes stage and action and gives seconds."""

    work_s: Callable[[int, Action], float] = lambda stage, action: 0.0
    """Added to the predicted duration."""
    feed_s: float = 0.0
    """Computing before a forward asks for its tensor; part of the forward's duration."""
    transfer_s: Callable[[int, Action], float] = lambda stage, action: 0.0
    """Added to the predicted transfer to that stage."""
    pause_s: Callable[[int, Action], float] = lambda stage, action: 0.0
    """Before an action."""
    call_s: float = 0.0
    """Of a receive."""
    meeting: Callable[[Action], bool] = lambda action: False
    """STEPs at which all stages wait for each other."""


def make_trace(plan: Plan, reality: Reality, *, iterations: int = 4, first: int = 0) -> list[ActionSpan]:
    """What the runtime would record, played as its ranks play: by hand, not by the code under test."""
    times = stage_times(plan)
    lists = extend_schedule(plan, iterations, first=first)
    pp = len(lists)
    spans: list[ActionSpan] = []
    free_s, position = [0.0] * pp, [0] * pp
    ends: dict[tuple[int, Action], float] = {}
    moved = True
    while moved:
        moved = False
        for stage, actions in enumerate(lists):
            while position[stage] < len(actions):
                action = actions[position[stage]]
                source = {"F": stage - 1, "B": stage + 1}.get(action.kind, -1)
                source = source if 0 <= source < pp else None
                meets = action.kind == "STEP" and reality.meeting(action)
                if source is not None and (source, action) not in ends:
                    break
                if meets and any(lists[s][position[s]] != action for s in range(pp)):
                    break
                clock_s = free_s[stage] + reality.pause_s(stage, action)
                busy_s = times.duration_s(stage, action) + reality.work_s(stage, action)
                if meets:
                    _meet(spans, free_s, action, busy_s)
                    position = [p + 1 for p in position]
                    moved = True
                    continue
                if action.kind == "F":
                    spans.append(ActionSpan(stage, COMPUTE, action, clock_s, clock_s + reality.feed_s))
                    clock_s, busy_s = clock_s + reality.feed_s, busy_s - reality.feed_s
                if source is not None:
                    transfer_s = times.p2p_s[action.htask] + reality.transfer_s(stage, action)
                    arrival_s = max(clock_s + reality.call_s, ends[source, action] + transfer_s)
                    spans.append(ActionSpan(stage, COMMUNICATION, action, clock_s, arrival_s))
                    clock_s = arrival_s
                spans.append(ActionSpan(stage, COMPUTE, action, clock_s, clock_s + busy_s))
                free_s[stage] = ends[stage, action] = clock_s + busy_s
                position[stage] += 1
                moved = True
    assert position == [len(actions) for actions in lists]
    return spans


def _meet(spans: list[ActionSpan], free_s: list[float], action: Action, busy_s: float) -> None:
    together_s = max(free_s)
    for stage, ready_s in enumerate(free_s):
        spans.append(ActionSpan(stage, COMMUNICATION, action, ready_s, together_s))
        spans.append(ActionSpan(stage, COMPUTE, action, together_s, together_s + busy_s))
        free_s[stage] = together_s + busy_s
