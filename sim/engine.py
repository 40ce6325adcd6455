"""Discrete-event simulation of a pipeline schedule: one SimPy process per stage, links that queue.

A stage plays its clocks in order and idles only for the tensors that its next clock needs; a clock is an
action, or the actions of several hTasks that share the stage. What a stage does in a clock is somebody else's
to say (:class:`StageWork`): wait for as long as the whole takes, or execute every operator. Every pair of
neighbouring stages is joined by two links, one per direction; a link carries one transfer at a time, and
sending does not hold up the sender. Where no link is ever asked for twice at once, the timeline is that of
:func:`muxtune.schedule.evaluate_schedule`.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Literal, Protocol

from simpy import Environment, Event

from muxtune.schedule import COMPUTE, Action, ActionSpan, StageTimes
from sim.noise import Noise
from sim.wires import Wires

ClockActions = Sequence[Action]
"""Actions that a stage plays together, of one kind and each of another hTask."""


def clock_htasks(clock: ClockActions) -> tuple[int, ...]:
    """Positions of the hTasks that share it, in the order of the clock."""
    return tuple(action.htask for action in clock)


def clock_kind(clock: ClockActions) -> Literal["F", "B"]:
    """Direction of a clock that is no STEP."""
    return "F" if clock[0].kind == "F" else "B"


class StageWork(Protocol):
    """What stages do in a clock."""

    def play(self, env: Environment, stage: int, clock: ClockActions) -> Generator[Event, object, None]:
        """Be busy with the clock's actions; a clock of STEPs takes no time and is not asked for."""
        ...


class WholeClocks:
    """Stages that are busy for as long as a clock takes, and do not say with what."""

    def __init__(self, times: StageTimes) -> None:
        self._times = times

    def play(self, env: Environment, stage: int, clock: ClockActions) -> Generator[Event, object, None]:
        """One event."""
        if len(clock) == 1:
            yield env.timeout(self._times.duration_s(stage, clock[0]))
        else:
            yield env.timeout(self._times.clock_s(clock_kind(clock), clock_htasks(clock))[stage])


def simulate_schedule(stages: Sequence[Sequence[Action]], times: StageTimes) -> list[ActionSpan]:
    """Play action lists, whole clocks at a time.

    Args:
        stages: One list per stage.
        times: Durations of the actions.

    Returns:
        Spans of both streams in the order in which they ended; a transfer is a span of its sender.

    Raises:
        RuntimeError: The schedule deadlocks; :func:`muxtune.schedule.check_schedule` refuses such
            schedules.
    """
    clocks = [times.cut(actions) for actions in stages]
    return play_clocks(clocks, WholeClocks(times), times.p2p_s)


def play_clocks(
    stages: Sequence[Sequence[ClockActions]],
    work: StageWork,
    p2p_s: Sequence[float],
    noise: Noise | None = None,
) -> list[ActionSpan]:
    """Play clocks.

    Args:
        stages: Clocks per stage.
        work: What a stage does in each.
        p2p_s: Seconds per transfer, per hTask.
        noise: What transfers vary by; nothing by default.

    Returns:
        Spans of actions and transfers in the order in which they ended.

    Raises:
        RuntimeError: The schedule deadlocks.
    """
    env = Environment()
    spans: list[ActionSpan] = []
    wires = Wires(env, len(stages), p2p_s, spans, noise or Noise())
    runs = [
        env.process(run_stage(env, stage, clocks, work=work, wires=wires, spans=spans))
        for stage, clocks in enumerate(stages)
    ]
    env.run()
    if any(run.is_alive for run in runs):
        raise RuntimeError("the schedule deadlocks")
    return spans


def run_stage(
    env: Environment,
    stage: int,
    clocks: Sequence[ClockActions],
    *,
    work: StageWork,
    wires: Wires,
    spans: list[ActionSpan],
) -> Generator[Event, object, None]:
    """Play one stage in plan order."""
    for clock in clocks:
        for action in clock:
            arrival = wires.arrival(stage, action)
            if arrival is not None:
                yield arrival
        start_s = env.now
        # A STEP has no duration of its own; an event for it would only reorder equal times.
        if clock[0].kind != "STEP":
            yield from work.play(env, stage, clock)
        for action in clock:
            spans.append(ActionSpan(stage, COMPUTE, action, start_s, env.now))
            wires.send(stage, action)
