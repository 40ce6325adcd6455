"""A clock: the actions of several hTasks that a stage plays together, on two streams."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, get_args

from muxtune.graph.nodes import Stream
from muxtune.orchestration.list_schedule import list_schedules
from muxtune.orchestration.orders import LaunchOrder, in_turns, items_of, one_after_another, turns_of
from muxtune.orchestration.streams import Barrier, Played, contended, play
from muxtune.orchestration.subgraphs import COMMUNICATION, COMPUTE
from muxtune.orchestration.timed_subgraphs import ClockSubgraphs, LaunchGraph

Mode = Literal["sequential", "intra", "round-robin", "interleaved"]
"""How the hTasks of a clock share a stage.

sequential   one after the other, and nothing computes while something communicates
intra        one after the other; what is independent inside one hTask overlaps
round-robin  they take turns, subgraph by subgraph
interleaved  list scheduling; never slower than the others
"""

MODES: tuple[Mode, ...] = get_args(Mode)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedLaunch:
    """A subgraph in its place."""

    htask: int
    """Position in the clock."""
    subgraph: int
    """Number in that hTask's launch order."""
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What no schedule without contention undercuts."""

    compute_s: float
    """All work on the compute stream."""
    communication_s: float
    """All work on the communication stream."""
    critical_path_s: float
    """Longest of any hTask, through subgraphs; see :attr:`LaunchGraph.critical_path_s`."""
    operator_path_s: float
    """Longest through single operators; no longer than that."""

    @property
    def serial_s(self) -> float:
        """Seconds without any overlap."""
        return self.compute_s + self.communication_s

    def lower_s(self, contention: float = 0.0) -> float:
        """Lower bound of a clock: the largest of the three.

        Contention stretches what overlaps, at least ``serial_s`` less the seconds without it; from 1 on,
        overlap is worth nothing (see :mod:`muxtune.orchestration.streams`).
        """
        return self._stretched(max(self.compute_s, self.communication_s, self.critical_path_s), contention)

    def operator_lower_s(self, contention: float = 0.0) -> float:
        """The weaker bound with the path through single operators."""
        return self._stretched(max(self.compute_s, self.communication_s, self.operator_path_s), contention)

    def _stretched(self, lower_s: float, contention: float) -> float:
        return lower_s + min(contention, 1.0) * (self.serial_s - lower_s)


@dataclass(frozen=True, kw_only=True)
class ClockSchedule:
    """When every subgraph of a clock runs."""

    mode: Mode
    """Mode that was asked for."""
    barrier: Barrier
    """Barrier of the schedule that was chosen: where overlap is useless under contention, ``interleaved`` has
    one, too."""
    contention: float
    seconds: float
    """Seconds until all hTasks are through."""
    exposed_communication_s: float
    """Seconds in which the communication stream is busy and the compute stream is not."""
    bounds: Bounds
    _clock: ClockSubgraphs = field(repr=False, compare=False)
    _items: Sequence[int] = field(repr=False)

    @property
    def lower_bound_s(self) -> float:
        """Seconds that no schedule of these hTasks undercuts under this contention."""
        return self.bounds.lower_s(self.contention)

    @cached_property
    def order(self) -> LaunchOrder:
        """What a stage has to know to play it, given the graphs."""
        return turns_of(self._clock, self._items, self.barrier)

    @cached_property
    def launches(self) -> dict[Stream, tuple[PlacedLaunch, ...]]:
        """Each stream's launches, in their order."""
        found: dict[Stream, list[PlacedLaunch]] = {"compute": [], "communication": []}
        for item in self._items:
            htask = self._clock.owners[item]
            launch = PlacedLaunch(
                htask=htask,
                subgraph=item - self._clock.firsts[htask],
                start_s=self._played.starts_s[item],
                end_s=self._played.ends_s[item],
            )
            found["communication" if self._clock.streams[item] == COMMUNICATION else "compute"].append(launch)
        return {stream: tuple(each) for stream, each in found.items()}

    @cached_property
    def operators(self) -> dict[Stream, tuple[tuple[int, int], ...]]:
        """Each stream's operators, in their order: hTask, and position in its expanded graph.

        Operators that run in this order, each for itself, run at the same times: those of a subgraph wait for
        the same ones of the other stream, and are waited for by the same.
        """
        cuts = [graph.cut.subgraphs for graph in self._clock.graphs]
        return {
            stream: tuple((each.htask, i) for each in found for i in cuts[each.htask][each.subgraph].nodes)
            for stream, found in self.launches.items()
        }

    @cached_property
    def _played(self) -> Played:
        return contended(self._clock, play(self._clock, self._items, self.barrier), self.contention)


def schedule_clock(graphs: Sequence[LaunchGraph], mode: Mode, contention: float = 0.0) -> ClockSchedule:
    """Schedule the hTasks that share a clock.

    Args:
        graphs: Timed subgraphs of each hTask.
        mode: How they share the stage.
        contention: Slowdown of a compute and a communication kernel that run at once: each runs at rate
            ``1 / (1 + contention)``.
    """
    assert contention >= 0, contention
    clock = ClockSubgraphs(graphs)
    if mode == "interleaved":
        barrier, items, alone_s = _interleaved(clock, contention)
    else:
        barrier = _BARRIERS[mode]
        items = in_turns(clock) if mode == "round-robin" else one_after_another(clock)
        alone_s = play(clock, items, barrier).seconds
    return _schedule(clock, items, alone_s, mode=mode, barrier=barrier, contention=contention)


def replay_clock(
    graphs: Sequence[LaunchGraph], order: LaunchOrder, mode: Mode, contention: float = 0.0
) -> ClockSchedule:
    """The schedule that an order gives, with these graphs' times.

    Raises:
        UserError: The order is not one of these graphs.
    """
    clock = ClockSubgraphs(graphs)
    items = items_of(clock, order)
    alone_s = play(clock, items, order.barrier).seconds
    return _schedule(clock, items, alone_s, mode=mode, barrier=order.barrier, contention=contention)


_BARRIERS: dict[Mode, Barrier] = {"sequential": "launch", "intra": "htask", "round-robin": "none"}


def _interleaved(clock: ClockSubgraphs, contention: float) -> tuple[Barrier, list[int], float]:
    """The shortest of list schedules and other modes: barrier, order, seconds without contention."""
    serial = one_after_another(clock)
    if contention >= 1:  # whatever overlaps takes longer than one after the other
        return "launch", serial, play(clock, serial, "launch").seconds
    lower_s = bounds_of(clock).lower_s()
    items, best_s = min(list_schedules(clock, lower_s), key=lambda schedule: schedule[1])
    barrier: Barrier = "none"
    if best_s > lower_s:
        others: tuple[tuple[Barrier, list[int]], ...] = (("none", in_turns(clock)), ("htask", serial))
        for each, order in others:
            seconds = play(clock, order, each).seconds
            if seconds < best_s:
                barrier, items, best_s = each, order, seconds
    return barrier, items, best_s


def bounds_of(clock: ClockSubgraphs) -> Bounds:
    """What no schedule of a clock undercuts."""
    return Bounds(
        compute_s=clock.work_s(COMPUTE),
        communication_s=clock.work_s(COMMUNICATION),
        critical_path_s=max((graph.critical_path_s for graph in clock.graphs), default=0.0),
        operator_path_s=max((graph.operator_path_s for graph in clock.graphs), default=0.0),
    )


def _schedule(
    clock: ClockSubgraphs,
    items: Sequence[int],
    alone_s: float,
    *,
    mode: Mode,
    barrier: Barrier,
    contention: float,
) -> ClockSchedule:
    bounds = bounds_of(clock)
    overlapped_s = 0.0 if barrier == "launch" else max(0.0, bounds.serial_s - alone_s)  # never are both idle
    return ClockSchedule(
        mode=mode,
        barrier=barrier,
        contention=contention,
        seconds=alone_s + contention * overlapped_s,
        exposed_communication_s=max(0.0, bounds.communication_s - overlapped_s),
        bounds=bounds,
        _clock=clock,
        _items=items,
    )
