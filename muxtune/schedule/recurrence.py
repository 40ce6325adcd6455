"""Closed recurrence of a pipeline schedule: when does every clock run, without contention?

    start(stage, i) = max(end(stage, i - 1), arrival of the tensors that clock i needs)

A clock goes forward when the previous stage's has, and back when the next stage's has. What it gives leaves
at its end, hTask after hTask over one link, and has arrived the sum of these transfers later. STEP takes no
time of its own: the optimizer's share is part of the backward. The SimPy engine must agree with this where
nothing contends (tested to 1e-9).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from muxtune.schedule.actions import Action, clocks_of
from muxtune.schedule.pipeline_order import Injection, iteration_clocks
from muxtune.schedule.trace import COMPUTE, ActionSpan, iteration_ends_s
from muxtune.support.errors import SpecError

ClockKind = tuple[Literal["F", "B"], tuple[int, ...]]
"""Direction and hTasks of a clock that several share."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClockTimes:
    """Clocks that the hTasks of a bucket share."""

    buckets: Sequence[Sequence[int]]
    """Buckets, each with its hTasks in the order in which a clock lists them."""
    microbatches: Sequence[int]
    """Micro-batches per hTask and iteration."""
    seconds: Mapping[ClockKind, Sequence[float]]
    """[stage], of every kind of clock with more than one hTask. A backward has its share of the steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTimes:
    """Durations that a schedule is played with, as a plan's ``predicted`` has them."""

    fwd_s: Sequence[Sequence[float]]
    """[stage][hTask], per micro-batch."""
    bwd_s: Sequence[Sequence[float]]
    """[stage][hTask], per micro-batch."""
    p2p_s: Sequence[float]
    """[hTask], per transfer."""
    clocks: ClockTimes | None = None
    """Times of the clocks of co-scheduled hTasks; None if every action is a clock of its own."""

    def duration_s(self, stage: int, action: Action) -> float:
        """Seconds that a stage is busy with an action that is a clock of its own."""
        if action.kind == "F":
            return self.fwd_s[stage][action.htask]
        if action.kind == "B":
            return self.bwd_s[stage][action.htask]
        return 0.0

    def clock_s(self, kind: Literal["F", "B"], htasks: tuple[int, ...]) -> Sequence[float]:
        """[stage], seconds that stages are busy with a clock.

        Raises:
            SpecError: Several hTasks share it, and its seconds are not known.
        """
        if len(htasks) == 1:
            table = self.fwd_s if kind == "F" else self.bwd_s
            return [row[htasks[0]] for row in table]
        known: Mapping[ClockKind, Sequence[float]] = self.clocks.seconds if self.clocks else {}
        if (kind, htasks) not in known:
            raise SpecError("clock_s", f"nothing for {kind} of hTasks {list(htasks)}", "seconds per stage")
        return known[kind, htasks]

    def transfers_s(self, htasks: tuple[int, ...]) -> float:
        """Seconds from the end of a clock until all that it gives has arrived."""
        return sum(self.p2p_s[h] for h in htasks)

    def cut(self, actions: Sequence[Action]) -> list[tuple[Action, ...]]:
        """A stage's list as clocks; a STEP stands alone."""
        if self.clocks is None:
            return clocks_of(actions, (), None)
        return clocks_of(actions, self.clocks.microbatches, self.clocks.buckets)


def evaluate_schedule(stages: Sequence[Sequence[Action]], times: StageTimes) -> list[ActionSpan]:
    """Spans of all compute actions, stage by stage; those of one clock are equal.

    Raises:
        RuntimeError: The schedule deadlocks; :func:`muxtune.schedule.check_schedule` refuses such
            schedules.
    """
    return [
        ActionSpan(stage, COMPUTE, action, start_s, end_s)
        for stage, clock, start_s, end_s in _moments(stages, times)
        for action in clock
    ]


def injected_iteration_s(injection: Injection, times: StageTimes) -> float:
    """:func:`steady_iteration_s` of the schedule that an injection gives: what a search ranks by.

    It never makes a list of actions or spans, which takes several times as long.
    """
    htasks = [clock.htasks for clock in injection.clocks]
    fwd_s, forward_transfers_s = _durations("F", htasks, times)
    bwd_s, backward_transfers_s = _durations("B", [htasks[i] for i in injection.backwards], times)
    stops = injection.forwards_before(len(times.fwd_s))
    played = _play(_Pipeline(stops, fwd_s, bwd_s, forward_transfers_s, backward_transfers_s))
    last = {injection.clocks[i].step: position for position, i in enumerate(injection.backwards)}
    return _steady_s([max(row[position] for row in played.backward_s) for position in last.values()])


def _gather(values: Sequence[float], positions: Sequence[int]) -> list[float]:
    return [values[position] for position in positions]


@dataclass(frozen=True, slots=True)
class _Pipeline:
    """Clocks by their positions in the order of forwards, and in that of backwards."""

    stops: Sequence[Sequence[int]]
    """[stage][position of a backward], forwards before it; one more entry may be for the end of the list."""
    fwd_s: Sequence[Sequence[float]]
    """[stage][position]."""
    bwd_s: Sequence[Sequence[float]]
    """[stage][position]."""
    forward_transfers_s: Sequence[float]
    backward_transfers_s: Sequence[float]


@dataclass(frozen=True, slots=True)
class _Played:
    forward_s: list[list[float]]
    """[stage][position], ends."""
    backward_s: list[list[float]]
    """[stage][position], ends."""


def _play(pipeline: _Pipeline) -> _Played:
    """The recurrence, backward by backward. A search spends most of its time here, hence the plain lists.

    What a stage plays forward before its backward i, the stage before it has played forward before its own
    backward i, or else the two wait for each other. So everything is there when it is asked for.
    """
    stops, fwd_s, bwd_s = pipeline.stops, pipeline.fwd_s, pipeline.bwd_s
    forward_transfers_s, backward_transfers_s = pipeline.forward_transfers_s, pipeline.backward_transfers_s
    pp = len(fwd_s)
    forward_s: list[list[float]] = [[] for _ in range(pp)]
    backward_s: list[list[float]] = [[] for _ in range(pp)]
    first, *others = zip(stops, fwd_s, forward_s, strict=True)
    *before, last = zip(range(pp), bwd_s, backward_s, strict=True)
    before.reverse()
    free_s = [0.0] * pp
    for i in range(len(stops[0])):
        stop, row, ends = first
        clock = free_s[0]
        for j in range(len(ends), stop[i]):
            clock += row[j]
            ends.append(clock)
        free_s[0] = clock
        stage = 0
        for stop, row, own in others:
            above, ends = ends, own
            stage += 1
            beyond, j = stop[i], len(ends)
            if j == beyond:
                continue
            if len(above) < beyond:
                raise RuntimeError("the schedule deadlocks")
            clock = free_s[stage]
            while j < beyond:
                arrival = above[j] + forward_transfers_s[j]
                if arrival > clock:  # noqa: PLR1730 (a call of max takes as long as the rest of the loop)
                    clock = arrival
                clock += row[j]
                ends.append(clock)
                j += 1
            free_s[stage] = clock
        if i == len(bwd_s[0]):
            break
        transfer_s = backward_transfers_s[i]
        stage, row, ends = last
        clock = free_s[stage] + row[i]
        free_s[stage] = clock
        ends.append(clock)
        for stage, row, ends in before:
            clock += transfer_s
            if clock < free_s[stage]:  # noqa: PLR1730 (likewise)
                clock = free_s[stage]
            clock += row[i]
            free_s[stage] = clock
            ends.append(clock)
    return _Played(forward_s, backward_s)


def _moments(
    stages: Sequence[Sequence[Action]], times: StageTimes
) -> Iterator[tuple[int, tuple[Action, ...], float, float]]:
    """Stage, clock, start and end of everything in some lists, stage by stage."""
    cut = [times.cut(actions) for actions in stages]
    forwards = [clock for clock in cut[0] if clock[0].kind == "F"]
    backwards = [clock for clock in cut[0] if clock[0].kind == "B"]
    fwd_s, forward_transfers_s = _durations("F", _htasks(forwards), times)
    bwd_s, backward_transfers_s = _durations("B", _htasks(backwards), times)
    stops = [_forwards_before_backwards(clocks) for clocks in cut]
    if any((len(stop), stop[-1]) != (len(backwards) + 1, len(forwards)) for stop in stops):
        raise RuntimeError("the schedule deadlocks: its stages play different clocks")
    played = _play(_Pipeline(stops, fwd_s, bwd_s, forward_transfers_s, backward_transfers_s))
    last = len(stages) - 1
    for stage, clocks in enumerate(cut):
        before = {"F": stage - 1, "B": stage + 1 if stage < last else -1}
        ends = {"F": played.forward_s, "B": played.backward_s}
        transfers = {"F": forward_transfers_s, "B": backward_transfers_s}
        number = {"F": 0, "B": 0}
        free_s = 0.0
        for clock in clocks:
            kind, start_s = clock[0].kind, free_s
            if kind != "STEP":
                i, source = number[kind], before[kind]
                if source >= 0:
                    start_s = max(free_s, ends[kind][source][i] + transfers[kind][i])
                free_s = ends[kind][stage][i]
                number[kind] = i + 1
            yield stage, clock, start_s, free_s


def _durations(
    kind: Literal["F", "B"], clocks: Sequence[tuple[int, ...]], times: StageTimes
) -> tuple[list[list[float]], list[float]]:
    """Seconds ``[stage][clock]`` of clocks given by their hTasks, and of the transfers that follow each."""
    numbers = {htasks: number for number, htasks in enumerate(dict.fromkeys(clocks))}
    of_clock = [numbers[htasks] for htasks in clocks]
    table = [times.clock_s(kind, htasks) for htasks in numbers]
    rows = [[seconds[stage] for seconds in table] for stage in range(len(times.fwd_s))]
    transfers_s = [times.transfers_s(htasks) for htasks in numbers]
    return [_gather(row, of_clock) for row in rows], _gather(transfers_s, of_clock)


def _htasks(clocks: Sequence[Sequence[Action]]) -> list[tuple[int, ...]]:
    return [tuple(action.htask for action in clock) for clock in clocks]


def _forwards_before_backwards(clocks: Sequence[Sequence[Action]]) -> list[int]:
    """Per backward of a list, forwards that stand before it; at last, all."""
    stops, forwards = [], 0
    for clock in clocks:
        if clock[0].kind == "F":
            forwards += 1
        elif clock[0].kind == "B":
            stops.append(forwards)
    return [*stops, forwards]


def makespan_s(spans: Sequence[ActionSpan]) -> float:
    """End of the last span."""
    return max(span.end_s for span in spans)


def steady_iteration_s(spans: Sequence[ActionSpan]) -> float:
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


def iteration_work_s(times: StageTimes, microbatches: Sequence[int]) -> list[float]:
    """Per stage, the work of all clocks of one iteration."""
    buckets = times.clocks.buckets if times.clocks else [[h] for h in range(len(microbatches))]
    rotation = iteration_clocks(buckets, microbatches, co_scheduled=True)
    counts = Counter(htasks for _, htasks in rotation)
    tables = [
        (count, times.clock_s("F", htasks), times.clock_s("B", htasks)) for htasks, count in counts.items()
    ]
    return [
        sum(count * (fwd_s[stage] + bwd_s[stage]) for count, fwd_s, bwd_s in tables)
        for stage in range(len(times.fwd_s))
    ]


def lower_bound_s(times: StageTimes, microbatches: Sequence[int]) -> float:
    """Work of the busiest stage in one iteration; no order of these clocks is faster."""
    return max(iteration_work_s(times, microbatches))
