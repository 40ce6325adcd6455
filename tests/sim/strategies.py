"""Random schedules with random durations, of whole clocks or of the operators in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hypothesis import strategies as st

from muxtune.schedule import Action, ClockKind, ClockTimes, StageTimes, build_schedule, shared_clocks
from sim.engine import ClockActions, clock_htasks, clock_kind
from sim.program import Program
from sim.streams import program_seconds
from tests.sim.programs import graphs, launch_orders


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    stages: list[list[Action]]
    times: StageTimes
    microbatches: tuple[int, ...]

    @property
    def clocks(self) -> list[list[tuple[Action, ...]]]:
        """The lists, cut."""
        return [self.times.cut(actions) for actions in self.stages]


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorCase:
    case: Case
    """With the durations of the programs at ``contention``."""
    programs: Callable[[int, ClockActions], Program]
    contention: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Structure:
    pp: int
    buckets: list[list[int]]
    microbatches: tuple[int, ...]
    co_scheduled: bool

    @property
    def kinds(self) -> list[ClockKind]:
        """All clocks that there are."""
        htasks = [(h,) for h in range(len(self.microbatches))]
        if self.co_scheduled:
            htasks += shared_clocks(self.buckets, self.microbatches)
        return [(kind, clock) for clock in htasks for kind in ("F", "B")]


@st.composite
def _structures(draw: st.DrawFn, *, most_htasks: int, most_stages: int) -> _Structure:
    htasks = draw(st.integers(1, most_htasks))
    order = draw(st.permutations(range(htasks)))
    cuts = sorted(draw(st.sets(st.integers(1, htasks - 1)))) if htasks > 1 else []
    return _Structure(
        pp=draw(st.integers(1, most_stages)),
        buckets=[list(order[i:j]) for i, j in zip([0, *cuts], [*cuts, htasks], strict=True)],
        microbatches=tuple(draw(st.lists(st.integers(1, 5), min_size=htasks, max_size=htasks))),
        co_scheduled=draw(st.booleans()),
    )


def _case(
    draw: st.DrawFn,
    structure: _Structure,
    seconds: dict[ClockKind, Sequence[float]],
    *,
    may_contend: bool,
) -> Case:
    htasks = len(structure.microbatches)
    fwd_s, bwd_s = (
        [[seconds[kind, (h,)][stage] for h in range(htasks)] for stage in range(structure.pp)]
        for kind in ("F", "B")
    )
    # Transfers of a clock that take no longer than any clock never meet the next ones on their link.
    longest_s = 2.0 if may_contend else min(map(min, seconds.values())) / htasks
    times = StageTimes(
        fwd_s=fwd_s,
        bwd_s=bwd_s,
        p2p_s=draw(st.lists(st.floats(0.0, longest_s), min_size=htasks, max_size=htasks)),
        clocks=ClockTimes(buckets=structure.buckets, microbatches=structure.microbatches, seconds=seconds)
        if structure.co_scheduled
        else None,
    )
    stages = build_schedule(
        structure.buckets,
        structure.microbatches,
        pp=structure.pp,
        template=draw(st.sampled_from(["flush", "continuous", "gpipe", "lorapp"])),
        steps=[draw(st.integers(1, 4))] * htasks,
        co_scheduled=structure.co_scheduled,
    )
    return Case(stages=stages, times=times, microbatches=structure.microbatches)


@st.composite
def cases(draw: st.DrawFn, *, may_contend: bool) -> Case:
    """Schedules of all templates, with shared clocks or without, played whole clocks at a time."""
    structure = draw(_structures(most_htasks=5, most_stages=6))
    per_stage = st.lists(st.floats(1e-4, 1.0), min_size=structure.pp, max_size=structure.pp)
    seconds = {kind: draw(per_stage) for kind in structure.kinds}
    return _case(draw, structure, seconds, may_contend=may_contend)


@st.composite
def operator_cases(draw: st.DrawFn, *, may_contend: bool = False) -> OperatorCase:
    """The same, of operators on two streams; stages run the same programs."""
    structure = draw(_structures(most_htasks=3, most_stages=4))
    contention = draw(st.sampled_from([0.0, 0.3, 2.0]))
    htasks = range(len(structure.microbatches))
    of = {(kind, h): draw(graphs(largest=5)) for kind in ("F", "B") for h in htasks}
    programs: dict[ClockKind, Program] = {}
    for kind, clock in structure.kinds:
        own = {h: of[kind, h] for h in clock}
        programs[kind, clock] = Program.launched(own, draw(launch_orders(own)))
    seconds = {
        kind: [program_seconds(program, contention)] * structure.pp for kind, program in programs.items()
    }
    return OperatorCase(
        case=_case(draw, structure, seconds, may_contend=may_contend),
        programs=lambda _, clock: programs[clock_kind(clock), clock_htasks(clock)],
        contention=contention,
    )
