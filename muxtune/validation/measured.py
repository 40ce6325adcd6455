"""What every clock of a run took, read from its trace.

The timings are cut such that :func:`muxtune.validation.replay.replay` gives the measured ends again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from statistics import median
from typing import NamedTuple

from muxtune.plan import Plan, extend_schedule
from muxtune.schedule import COMMUNICATION, Action, ActionSpan, ClockActions, Kind
from muxtune.support.errors import UserError
from muxtune.validation.replay import (
    ClockTiming,
    cut_clocks,
    source_stage,
    stages_meet,
)


class ClockClass(NamedTuple):
    """Clocks that the model takes to be alike."""

    stage: int
    kind: Kind
    htasks: tuple[int, ...]


def class_of(stage: int, clock: ClockActions) -> ClockClass:
    """Class of a clock on a stage."""
    return ClockClass(stage, clock[0].kind, tuple(action.htask for action in clock))


@dataclass(frozen=True)
class MeasuredRun:
    """A run's clocks and what they took."""

    plan: Plan
    stages: Sequence[Sequence[ClockActions]]
    """[stage], in the order in which they were played."""
    timings: Sequence[Sequence[ClockTiming]]
    """[stage][position]."""
    steady: tuple[int, ...]
    """Iterations that count."""

    def step_of(self, clock: ClockActions) -> int:
        """Iteration that a clock belongs to."""
        action = clock[0]
        return (
            action.number if action.kind == "STEP" else action.number // self.plan.microbatches[action.htask]
        )

    def clocks(self) -> Iterator[tuple[int, ClockActions, ClockTiming]]:
        """Stage, clock and timing of everything."""
        for stage, (clocks, timings) in enumerate(zip(self.stages, self.timings, strict=True)):
            for clock, timing in zip(clocks, timings, strict=True):
                yield stage, clock, timing

    def window_s(self, ends_s: Mapping[int, float]) -> tuple[float, float]:
        """Start and end of the steady iterations, by the ends of all."""
        return ends_s.get(self.steady[0] - 1, 0.0), ends_s[self.steady[-1]]

    @cached_property
    def by_class(self) -> dict[ClockClass, list[ClockTiming]]:
        """Timings in steady iterations; of classes that have none there, all."""
        steady: dict[ClockClass, list[ClockTiming]] = defaultdict(list)
        everywhere: dict[ClockClass, list[ClockTiming]] = defaultdict(list)
        counted = set(self.steady)
        for stage, clock, timing in self.clocks():
            key = class_of(stage, clock)
            everywhere[key].append(timing)
            if self.step_of(clock) in counted:
                steady[key].append(timing)
        return {key: steady.get(key) or timings for key, timings in everywhere.items()}

    @cached_property
    def per_iteration(self) -> dict[ClockClass, float]:
        """Mean number of clocks of each class in a steady iteration."""
        counted = set(self.steady)
        counts = dict.fromkeys(self.by_class, 0)
        for stage, clock, _ in self.clocks():
            counts[class_of(stage, clock)] += self.step_of(clock) in counted
        return {key: count / len(counted) for key, count in counts.items()}

    @cached_property
    def typical(self) -> dict[ClockClass, ClockTiming]:
        """Medians of each class."""
        return {
            key: ClockTiming(
                **{
                    field.name: median(getattr(t, field.name) for t in timings)
                    for field in fields(ClockTiming)
                }
            )
            for key, timings in self.by_class.items()
        }


def read_run(plan: Plan, spans: Sequence[ActionSpan], steady: Sequence[int]) -> MeasuredRun:
    """Cut a measured timeline into clocks.

    Args:
        plan: Plan that was run.
        spans: Spans of both streams, one rank per stage.
        steady: Iterations that count, see ``run.json``.

    Raises:
        UserError: The trace is not one of such a run.
    """
    numbers = [span.action.number for span in spans if span.action.kind == "STEP"]
    if not numbers:
        raise UserError("the trace has no complete iteration")
    schedule = extend_schedule(plan, max(numbers) + 1, first=min(numbers))
    stages = cut_clocks(plan, schedule)
    own: dict[tuple[int, Action], list[ActionSpan]] = defaultdict(list)
    for span in spans:
        own[span.stage, span.action].append(span)
    for stage, actions in enumerate(schedule):
        for action in actions:
            if (stage, action) not in own:
                raise UserError(f"the trace has no {action} on stage {stage}, which the plan's schedule has")
    cuts = [_cut_stage(plan, stage, clocks, own) for stage, clocks in enumerate(stages)]
    return MeasuredRun(plan, stages, _timings(plan, stages, cuts), tuple(steady))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cut:
    """A clock's place in the measured timeline."""

    gap_s: float
    lead_s: float
    waits_from_s: float
    """Where it first waits for other ranks; where its work begins if it never does."""
    begin_s: float
    """Where it has all that it waited for."""
    end_s: float


def _cut_stage(
    plan: Plan,
    stage: int,
    clocks: Sequence[ClockActions],
    own: Mapping[tuple[int, Action], Sequence[ActionSpan]],
) -> list[_Cut]:
    cuts: list[_Cut] = []
    free_s = 0.0
    for clock in clocks:
        spans = sorted(
            (span for action in clock for span in own[stage, action]), key=lambda span: span.start_s
        )
        start_s, end_s = max(free_s, spans[0].start_s), max(span.end_s for span in spans)
        waits = _waits(plan, stage, clock, spans)
        waits_from_s = min((span.start_s for span in waits), default=start_s)
        waited_s = sum(span.duration_s for span in waits)
        lead_s = max(0.0, waits_from_s - start_s)
        cuts.append(
            _Cut(
                gap_s=start_s - free_s,
                lead_s=lead_s,
                waits_from_s=start_s + lead_s,
                begin_s=min(start_s + lead_s + waited_s, end_s),
                end_s=max(end_s, start_s),
            )
        )
        free_s = cuts[-1].end_s
    return cuts


def _waits(plan: Plan, stage: int, clock: ClockActions, spans: Sequence[ActionSpan]) -> list[ActionSpan]:
    """Spans of a clock in which it waits for another stage's tensors, or for other ranks at a STEP.

    What else an action communicates, such as sums over the ranks of its stage, is part of its work, as the
    prediction has it. The wait for a neighbour comes first in an action, that for all stages last in a STEP.
    """
    waits = [span for span in spans if span.stream == COMMUNICATION]
    if stages_meet(plan, clock):
        return waits[-1:]
    if clock[0].kind == "STEP":
        return waits
    if source_stage(clock, stage, plan.parallelism.pp) is None:
        return []
    first: dict[Action, ActionSpan] = {}
    for span in waits:
        first.setdefault(span.action, span)
    return list(first.values())


def _timings(
    plan: Plan, stages: Sequence[Sequence[ClockActions]], cuts: Sequence[Sequence[_Cut]]
) -> list[list[ClockTiming]]:
    place = {
        (stage, clock): cut
        for stage, (clocks, row) in enumerate(zip(stages, cuts, strict=True))
        for clock, cut in zip(clocks, row, strict=True)
    }
    transfers = _observed_transfers_s(plan, place)
    return [
        [_timing(plan, stage, clock, place, transfers) for clock in clocks]
        for stage, clocks in enumerate(stages)
    ]


def _observed_transfers_s(
    plan: Plan, place: Mapping[tuple[int, ClockActions], _Cut]
) -> dict[ClockClass, float]:
    """Median transfer of every class of messages for which the receiver stood ready.

    A message that came before it was asked for says only that it took no longer than until then.
    """
    seen: dict[ClockClass, list[float]] = defaultdict(list)
    for (stage, clock), cut in place.items():
        source = source_stage(clock, stage, plan.parallelism.pp)
        if source is not None and cut.waits_from_s < place[source, clock].end_s:
            seen[class_of(stage, clock)].append(cut.begin_s - place[source, clock].end_s)
    return {key: median(seconds) for key, seconds in seen.items()}


def _timing(
    plan: Plan,
    stage: int,
    clock: ClockActions,
    place: Mapping[tuple[int, ClockActions], _Cut],
    transfers_s: Mapping[ClockClass, float],
) -> ClockTiming:
    cut = place[stage, clock]
    plain = ClockTiming(gap_s=cut.gap_s, lead_s=cut.lead_s, busy_s=cut.end_s - cut.begin_s)
    if stages_meet(plan, clock):
        last_s = max(place[other, clock].waits_from_s for other in range(plan.parallelism.pp))
        return replace(plain, sync_s=cut.begin_s - last_s)
    source = source_stage(clock, stage, plan.parallelism.pp)
    if source is None:
        return replace(plain, sync_s=cut.begin_s - cut.waits_from_s)
    sent_s = place[source, clock].end_s
    usual_s = transfers_s.get(class_of(stage, clock), sum(plan.predicted.p2p_s[a.htask] for a in clock))
    if cut.waits_from_s < sent_s + usual_s:
        return replace(plain, transfer_s=cut.begin_s - sent_s)
    # The tensor was there before it was asked for; what the call took is the receiver's own time.
    call_s = cut.begin_s - cut.waits_from_s
    return replace(plain, gap_s=cut.gap_s + call_s, transfer_s=usual_s)
