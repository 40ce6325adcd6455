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
    played = _play(stages, times)
    return [
        Span(stage, COMPUTE, action, start_s, end_s)
        for stage, first, last in played.runs
        for action, start_s, end_s in zip(
            stages[stage][first:last],
            played.starts_s[stage][first:last],
            played.ends_s[stage][first:last],
            strict=True,
        )
    ]


def schedule_iteration_s(stages: Sequence[Sequence[Action]], times: StageTimes) -> float:
    """``steady_iteration_s(evaluate_schedule(stages, times))`` without the spans: what a search ranks by.

    Raises:
        RuntimeError: The schedule deadlocks.
    """
    played = _play(stages, times)
    ends: dict[int, float] = {}
    for actions, ends_s in zip(stages, played.ends_s, strict=True):
        for action, end_s in zip(actions, ends_s, strict=True):
            if action.kind == "STEP":
                ends[action.number] = max(ends.get(action.number, 0.0), end_s)
    return _steady_s([ends[k] for k in sorted(ends)])


@dataclass(frozen=True, slots=True)
class _Played:
    starts_s: list[list[float]]
    """[stage][slot]."""
    ends_s: list[list[float]]
    """[stage][slot]."""
    runs: list[tuple[int, int, int]]
    """Stage, first slot, and the slot where it had to wait for another stage; in the order of resolution."""


def _play(stages: Sequence[Sequence[Action]], times: StageTimes) -> _Played:
    """The recurrence. A search spends most of its time here, hence the plain lists and local names."""
    pp = len(stages)
    starts_s: list[list[float]] = [[] for _ in stages]
    ends_s: list[list[float]] = [[] for _ in stages]
    forwards: list[dict[tuple[int, int], float]] = [{} for _ in stages]  # end by (hTask, micro-batch)
    backwards: list[dict[tuple[int, int], float]] = [{} for _ in stages]
    runs: list[tuple[int, int, int]] = []
    p2p_s = times.p2p_s
    moved = True
    while moved:
        moved = False
        for stage, actions in enumerate(stages):
            starts, ends = starts_s[stage], ends_s[stage]
            first = len(ends)
            clock = ends[-1] if ends else 0.0
            fwd_s, bwd_s = times.fwd_s[stage], times.bwd_s[stage]
            upstream = forwards[stage - 1] if stage > 0 else None
            downstream = backwards[stage + 1] if stage < pp - 1 else None
            for action in actions[first:]:
                start = clock
                if action.kind != "STEP":
                    h = action.htask
                    key = (h, action.number)
                    is_forward = action.kind == "F"
                    source = upstream if is_forward else downstream
                    if source is not None:
                        sent = source.get(key)
                        if sent is None:
                            break
                        start = max(clock, sent + p2p_s[h])
                    if is_forward:
                        clock = forwards[stage][key] = start + fwd_s[h]
                    else:
                        clock = backwards[stage][key] = start + bwd_s[h]
                starts.append(start)
                ends.append(clock)
            if len(ends) > first:
                runs.append((stage, first, len(ends)))
                moved = True
    if any(len(ends) < len(actions) for ends, actions in zip(ends_s, stages, strict=True)):
        raise RuntimeError("the schedule deadlocks")
    return _Played(starts_s, ends_s, runs)


def makespan_s(spans: Sequence[Span]) -> float:
    """End of the last span."""
    return max(span.end_s for span in spans)


def steady_iteration_s(spans: Sequence[Span]) -> float:
    """Time between the ends of successive iterations.

    The first end follows the fill and the last one is early, because nothing is injected behind it; from
    three iterations on the last is left out. A single iteration counts from 0.
    """
    return _steady_s(iteration_ends_s(spans))


def _steady_s(ends_s: list[float]) -> float:
    if len(ends_s) == 1:
        return ends_s[0]
    if len(ends_s) > 2:
        ends_s = ends_s[:-1]
    return (ends_s[-1] - ends_s[0]) / (len(ends_s) - 1)


def lower_bound_s(times: StageTimes, microbatches: Sequence[int]) -> float:
    """Work of the busiest stage in one iteration."""
    return max(
        sum(m * (f + b) for m, f, b in zip(microbatches, fwd, bwd, strict=True))
        for fwd, bwd in zip(times.fwd_s, times.bwd_s, strict=True)
    )
