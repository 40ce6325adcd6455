"""The recurrence of :mod:`muxtune.schedule.recurrence`, with a duration for every single clock.

    ready(s, i) = end(s, i - 1) + gap + lead
    start(s, i) = max(ready(s, i), end of the neighbour's clock + transfer) + sync
    end(s, i)   = start(s, i) + busy

With a plan's durations, without gaps and with STEPs that take no time, this is that recurrence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from muxtune.plan import Plan, stage_times
from muxtune.schedule import Action, ClockActions


@dataclass(frozen=True, slots=True, kw_only=True)
class ClockTiming:
    """What one clock takes on one stage, in the order of time."""

    gap_s: float = 0.0
    """Seconds after the clock before it that are neither computing nor waiting."""
    lead_s: float = 0.0
    """Computing that does not need the neighbour's tensor."""
    transfer_s: float = 0.0
    """Seconds from the end of the neighbour's clock to the arrival of its tensor. Below 0 if that leaves
    earlier."""
    sync_s: float = 0.0
    """Exchange with other ranks once all are there."""
    busy_s: float
    """Computing from then on."""


@dataclass(frozen=True, slots=True)
class Moment:
    """A clock that was played."""

    ready_s: float
    """When the stage could do no more without other ranks."""
    start_s: float
    """When it had all that it waited for."""
    end_s: float


Timing = Callable[[int, int], ClockTiming]
"""Timing of a stage's clock by its position in the list."""


def cut_clocks(plan: Plan, stages: Sequence[Sequence[Action]]) -> list[list[ClockActions]]:
    """The clocks of action lists, per stage."""
    times = stage_times(plan)
    return [times.cut(actions) for actions in stages]


def source_stage(clock: ClockActions, stage: int, stages: int) -> int | None:
    """The neighbour whose clock of the same name this one needs; None where it needs none."""
    source = {"F": stage - 1, "B": stage + 1}.get(clock[0].kind, -1)
    return source if 0 <= source < stages else None


def stages_meet(plan: Plan, clock: ClockActions) -> bool:
    """Whether all stages wait for each other in a clock: a STEP that clips by the norm over all of them."""
    step = clock[0]
    return (
        step.kind == "STEP"
        and plan.parallelism.pp > 1
        and any(
            task.max_grad_norm is not None and step.number < task.steps
            for task in plan.htask_tasks(step.htask)
        )
    )


def replay(
    stages: Sequence[Sequence[ClockActions]],
    timing: Timing,
    meets: Callable[[ClockActions], bool] = lambda _: False,
) -> list[list[Moment]]:
    """Play clocks.

    Args:
        stages: Clocks per stage.
        timing: Timing of each clock on each stage.
        meets: Whether no stage plays this clock before all of them are ready for it.

    Returns:
        [stage][position].

    Raises:
        RuntimeError: The schedule deadlocks.
    """
    played: list[list[Moment]] = [[] for _ in stages]
    ends: dict[tuple[int, ClockActions], float] = {}
    ready: dict[ClockActions, dict[int, float]] = {}  # of clocks where stages meet

    def advance(stage: int) -> bool:
        """Play a stage's next clock if what it needs is there."""
        position = len(played[stage])
        if position == len(stages[stage]):
            return False
        clock, times = stages[stage][position], timing(stage, position)
        free_s = played[stage][-1].end_s if position else 0.0
        ready_s = start_s = free_s + times.gap_s + times.lead_s
        source = source_stage(clock, stage, len(stages))
        if source is not None:
            if (source, clock) not in ends:
                return False
            start_s = max(start_s, ends[source, clock] + times.transfer_s)
        if meets(clock):
            there = ready.setdefault(clock, {})
            there[stage] = ready_s
            if len(there) < len(stages):
                return False
            start_s = max(there.values())
        start_s += times.sync_s
        end_s = start_s + times.busy_s
        ends[stage, clock] = end_s
        played[stage].append(Moment(ready_s, start_s, end_s))
        return True

    while any([_advance_far(advance, stage) for stage in range(len(stages))]):
        pass
    if any(len(own) < len(clocks) for own, clocks in zip(played, stages, strict=True)):
        raise RuntimeError("the schedule deadlocks")
    return played


def _advance_far(advance: Callable[[int], bool], stage: int) -> bool:
    moved = False
    while advance(stage):
        moved = True
    return moved


def iteration_ends_s(
    stages: Sequence[Sequence[ClockActions]], played: Sequence[Sequence[Moment]]
) -> dict[int, float]:
    """End of each iteration by its number: that of its last STEP on any stage."""
    ends: dict[int, float] = {}
    for clocks, moments in zip(stages, played, strict=True):
        for clock, moment in zip(clocks, moments, strict=True):
            if clock[0].kind == "STEP":
                number = clock[0].number
                ends[number] = max(ends.get(number, 0.0), moment.end_s)
    return {number: ends[number] for number in sorted(ends)}


def iteration_lengths_s(ends_s: Mapping[int, float]) -> dict[int, float]:
    """Seconds of each iteration: from the end of the one before, the first from 0."""
    starts_s = [0.0, *ends_s.values()]
    return {number: ends_s[number] - start_s for number, start_s in zip(ends_s, starts_s, strict=False)}
