"""Closed recurrence of a pipeline schedule: when does every action run, without contention?

    start(stage, i) = max(end(stage, i - 1), arrival of the tensor that action i needs)

An F needs the previous stage's F of the same micro-batch, a B the next stage's B; both arrive one transfer
after the other stage is done. STEP takes no time of its own: the optimizer's share is part of the backward.
The SimPy engine must agree with this where nothing contends (tested to 1e-9).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from muxtune.schedule import Action
from muxtune.trace import COMPUTE, Span, iteration_ends_s


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTimes:
    """Durations that a schedule is played with, as a plan's ``predicted`` has them."""

    fwd_s: Sequence[Sequence[float]]
    """[stage][hTask], per micro-batch."""
    bwd_s: Sequence[Sequence[float]]
    """[stage][hTask], per micro-batch."""
    p2p_s: Sequence[float]
    """[hTask], per transfer."""

    def duration_s(self, stage: int, action: Action) -> float:
        """Seconds that a stage is busy with an action."""
        if action.kind == "F":
            return self.fwd_s[stage][action.htask]
        if action.kind == "B":
            return self.bwd_s[stage][action.htask]
        return 0.0


def evaluate_schedule(stages: Sequence[Sequence[Action]], times: StageTimes) -> list[Span]:
    """Spans of all compute actions, in the order in which they could be resolved.

    Raises:
        RuntimeError: The schedule deadlocks; :func:`muxtune.schedule.check_schedule` refuses such schedules.
    """
    pp = len(stages)
    clock = [0.0] * pp
    position = [0] * pp
    ends: dict[tuple[int, str, int, int], float] = {}
    spans: list[Span] = []
    moved = True
    while moved:
        moved = False
        for stage in range(pp):
            actions = stages[stage]
            while position[stage] < len(actions):
                action = actions[position[stage]]
                source = _source(action, stage, pp)
                ready = 0.0
                if source is not None:
                    sent = ends.get((source, action.kind, action.htask, action.number))
                    if sent is None:
                        break
                    ready = sent + times.p2p_s[action.htask]
                start = max(clock[stage], ready)
                end = start + times.duration_s(stage, action)
                clock[stage] = end
                ends[stage, action.kind, action.htask, action.number] = end
                spans.append(Span(stage, COMPUTE, action, start, end))
                position[stage] += 1
                moved = True
    if any(position[stage] < len(stages[stage]) for stage in range(pp)):
        raise RuntimeError("the schedule deadlocks")
    return spans


def _source(action: Action, stage: int, pp: int) -> int | None:
    """Stage whose output an action waits for."""
    if action.kind == "F" and stage > 0:
        return stage - 1
    if action.kind == "B" and stage < pp - 1:
        return stage + 1
    return None


def makespan_s(spans: Sequence[Span]) -> float:
    """End of the last span."""
    return max(span.end_s for span in spans)


def steady_iteration_s(spans: Sequence[Span]) -> float:
    """Time between the ends of successive iterations.

    The first end follows the fill and the last one is early, because nothing is injected behind it; from
    three iterations on the last is left out. A single iteration counts from 0.
    """
    ends = iteration_ends_s(spans)
    if len(ends) == 1:
        return ends[0]
    if len(ends) > 2:
        ends = ends[:-1]
    return (ends[-1] - ends[0]) / (len(ends) - 1)


def lower_bound_s(times: StageTimes, microbatches: Sequence[int]) -> float:
    """Work of the busiest stage in one iteration."""
    return max(
        sum(m * (f + b) for m, f, b in zip(microbatches, fwd, bwd, strict=True))
        for fwd, bwd in zip(times.fwd_s, times.bwd_s, strict=True)
    )
