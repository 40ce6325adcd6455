"""Discrete-event simulation of a pipeline schedule: one SimPy process per stage, links that queue.

A stage plays its action list in order and idles only for the tensor that its next action needs. Every pair of
neighbouring stages is joined by two links, one per direction; a link carries one transfer at a time, and
sending does not hold up the sender. Where no link is ever asked for twice at once, the timeline is that of
:func:`muxtune.timeline.evaluate_schedule`.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

from simpy import Environment, Event, Resource

from muxtune.errors import SpecError
from muxtune.plan import Plan
from muxtune.prediction import iteration_tokens, predict, stage_times
from muxtune.schedule import Action, build_schedule
from muxtune.timeline import StageTimes
from muxtune.trace import COMMUNICATION, COMPUTE, Span
from sim.report import SimulationReport


def simulate_plan(plan: Plan, *, iterations: int | None = None) -> SimulationReport:
    """Play a plan with the durations that it carries.

    Args:
        plan: Checked, as :func:`muxtune.plan.load_plan` returns it.
        iterations: Play so many iterations of the plan's template instead of those that it has scheduled.

    Returns:
        The timeline, and the numbers of ``plan.predicted`` computed from it.

    Raises:
        SpecError: ``iterations`` is below 1.
    """
    if iterations is not None and iterations < 1:
        raise SpecError("iterations", iterations, "at least 1")
    times = stage_times(plan)
    stages: Sequence[Sequence[Action]] = plan.actions
    if iterations is not None:
        stages = build_schedule(
            plan.buckets,
            plan.microbatches,
            pp=plan.parallelism.pp,
            template=plan.template,
            steps=[iterations] * len(plan.htasks),
        )
    spans = simulate_schedule(stages, times)
    predicted = predict(
        spans,
        times=times,
        microbatches=plan.microbatches,
        tokens=iteration_tokens(plan),
        peak_memory_bytes=plan.predicted.peak_memory_bytes,
    )
    return SimulationReport(spans=tuple(spans), predicted=predicted)


def simulate_schedule(stages: Sequence[Sequence[Action]], times: StageTimes) -> list[Span]:
    """Play action lists.

    Args:
        stages: One list per stage.
        times: Their durations.

    Returns:
        Spans of both streams in the order in which they ended; a transfer is a span of its sender.

    Raises:
        RuntimeError: The schedule deadlocks; :func:`muxtune.schedule.check_schedule` refuses such schedules.
    """
    env = Environment()
    spans: list[Span] = []
    wires = Wires(env, len(stages), times.p2p_s, spans)
    runs = [
        env.process(run_stage(env, stage, actions, times=times, wires=wires, spans=spans))
        for stage, actions in enumerate(stages)
    ]
    env.run()
    if any(run.is_alive for run in runs):
        raise RuntimeError("the schedule deadlocks")
    return spans


def run_stage(
    env: Environment,
    stage: int,
    actions: Sequence[Action],
    *,
    times: StageTimes,
    wires: Wires,
    spans: list[Span],
) -> Generator[Event, object, None]:
    """Play one stage in plan order."""
    for action in actions:
        arrival = wires.arrival(stage, action)
        if arrival is not None:
            yield arrival
        start_s = env.now
        # A STEP has no duration of its own; an event for it would only reorder equal times.
        if action.kind != "STEP":
            yield env.timeout(times.duration_s(stage, action))
        spans.append(Span(stage, COMPUTE, action, start_s, env.now))
        wires.send(stage, action)


class Wires:
    """Links between neighbouring stages, and the tensors that travel on them.

    Args:
        env: Clock of the run.
        stages: How many there are.
        p2p_s: Seconds per transfer, per hTask.
        spans: Where transfers are noted.
    """

    def __init__(self, env: Environment, stages: int, p2p_s: Sequence[float], spans: list[Span]) -> None:
        self._env = env
        self._stages = stages
        self._p2p_s = p2p_s
        self._spans = spans
        self._links: dict[tuple[int, int], Resource] = {}
        for left in range(stages - 1):
            for pair in ((left, left + 1), (left + 1, left)):
                self._links[pair] = Resource(env, capacity=1)
        self._arrivals: dict[tuple[int, Action], Event] = {}

    def arrival(self, stage: int, action: Action) -> Event | None:
        """Fires when the input of ``action`` has reached ``stage``; None where none comes from elsewhere."""
        needs_input = (action.kind == "F" and stage > 0) or (action.kind == "B" and stage < self._stages - 1)
        return self._event(stage, action) if needs_input else None

    def send(self, stage: int, action: Action) -> None:
        """Start to send the result of ``action``: activations downstream, gradients upstream."""
        receiver = {"F": stage + 1, "B": stage - 1}.get(action.kind, -1)
        if 0 <= receiver < self._stages:
            self._env.process(self._transfer(stage, receiver, action))

    def _transfer(self, sender: int, receiver: int, action: Action) -> Generator[Event, object, None]:
        with self._links[sender, receiver].request() as turn:
            yield turn
            start_s = self._env.now
            yield self._env.timeout(self._p2p_s[action.htask])
        self._spans.append(Span(sender, COMMUNICATION, action, start_s, self._env.now))
        self._event(receiver, action).succeed()

    def _event(self, stage: int, action: Action) -> Event:
        key = (stage, action)
        if key not in self._arrivals:
            self._arrivals[key] = self._env.event()
        return self._arrivals[key]
