"""Predicted against measured: per class of actions, stage and iteration."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import mean, median
from typing import Literal

from pydantic import BaseModel, ConfigDict

from muxtune.schedule import Kind
from muxtune.validation.classes import class_works
from muxtune.validation.measured import MeasuredRun, class_of
from muxtune.validation.replay import (
    ClockTiming,
    Moment,
    iteration_ends_s,
    iteration_lengths_s,
    replay,
    stages_meet,
)

_STRICT = ConfigDict(frozen=True, extra="forbid")


class Comparison(BaseModel):
    """A number predicted and measured."""

    model_config = _STRICT

    predicted: float
    measured: float
    error: float | None
    """(predicted - measured) / measured; null where nothing was measured."""


def compare(predicted: float, measured: float) -> Comparison:
    """The two and their error."""
    error = (predicted - measured) / measured if measured else None
    return Comparison(predicted=predicted, measured=measured, error=error)


class ClassComparison(BaseModel):
    """Actions of one kind and hTask on one stage, or clocks that several hTasks share."""

    model_config = _STRICT

    kind: Kind
    stage: int
    htasks: tuple[int, ...]
    count: int
    """Number in the steady iterations."""
    per_iteration: float
    """Mean number in a steady iteration."""
    predicted_s: float
    """Predicted seconds; of B without what it leaves for STEP, of STEP what B leaves for it."""
    median_s: float
    mean_s: float
    error: float | None
    """(predicted - median) / median."""


class StageComparison(BaseModel):
    """What a stage does between the ends of steady iterations, per iteration; columns add up to the mean.

    Under templates that do not drain, work of neighbouring iterations lies in that time, and work of its own
    before it.
    """

    model_config = _STRICT

    stage: int
    forward_s: Comparison
    backward_s: Comparison
    """Backwards without STEP."""
    step_s: Comparison
    waiting_s: Comparison
    """Waiting for a neighbour's tensor, and for other ranks at STEPs."""
    between_s: Comparison
    """Time between actions, neither computing nor waiting."""


class IterationComparison(BaseModel):
    """One iteration of a run."""

    model_config = _STRICT

    step: int
    steady: bool
    """Whether medians count it."""
    seconds: Comparison
    """Predicted by a replay of the run's whole schedule."""


class SlowIteration(BaseModel):
    """The slowest steady iteration, and where in it most was lost."""

    model_config = _STRICT

    step: int
    seconds: float
    excess_s: float
    """Seconds over the median iteration."""
    stage: int
    action: str
    place: Literal["in", "before", "message"]
    """Place of the loss: in the action, before it, or on the way of its message."""
    place_excess_s: float
    """Seconds over the median of the action's class."""


class RunComparison(BaseModel):
    """All tables of a run."""

    model_config = _STRICT

    classes: tuple[ClassComparison, ...]
    stages: tuple[StageComparison, ...]
    iterations: tuple[IterationComparison, ...]
    slowest: SlowIteration


def compare_run(run: MeasuredRun) -> RunComparison:
    """Predicted against measured; the prediction is the run's schedule with the plan's durations."""
    works = class_works(run)
    predicted_timings = [
        [works[class_of(stage, clock)].predicted for clock in clocks]
        for stage, clocks in enumerate(run.stages)
    ]
    predicted = _Timeline(run, predicted_timings, meet=False)
    measured = _Timeline(run, run.timings, meet=True)
    return RunComparison(
        classes=_compare_classes(run),
        stages=_compare_stages(run, predicted, measured),
        iterations=tuple(
            IterationComparison(
                step=step,
                steady=step in run.steady,
                seconds=compare(predicted.lengths_s[step], measured_s),
            )
            for step, measured_s in measured.lengths_s.items()
        ),
        slowest=_slowest(run, measured),
    )


class _Timeline:
    """A replay, and what its stages do in its steady iterations."""

    def __init__(self, run: MeasuredRun, timings: Sequence[Sequence[ClockTiming]], *, meet: bool) -> None:
        self._run = run
        self._timings = timings
        self.played: list[list[Moment]] = replay(
            run.stages,
            lambda stage, position: timings[stage][position],
            lambda clock: meet and stages_meet(run.plan, clock),
        )
        self.ends_s = iteration_ends_s(run.stages, self.played)
        self.lengths_s = iteration_lengths_s(self.ends_s)

    def seconds(self, stage: int) -> dict[str, float]:
        """Per steady iteration by kind of action, ``between``, and ``waiting`` for all that is left."""
        start_s, end_s = self._run.window_s(self.ends_s)
        totals = dict.fromkeys(("F", "B", "STEP", "waiting", "between"), 0.0)
        totals["waiting"] = end_s - start_s
        for name, from_s, to_s in self._spells(stage):
            seconds = max(0.0, min(to_s, end_s) - max(from_s, start_s))
            totals[name] += seconds
            totals["waiting"] -= seconds
        return {name: seconds / len(self._run.steady) for name, seconds in totals.items()}

    def _spells(self, stage: int) -> Iterator[tuple[str, float, float]]:
        rows = zip(self._run.stages[stage], self._timings[stage], self.played[stage], strict=True)
        for clock, timing, moment in rows:
            kind, lead_from_s = clock[0].kind, moment.ready_s - timing.lead_s
            yield "between", lead_from_s - timing.gap_s, lead_from_s
            yield kind, lead_from_s, moment.ready_s
            yield kind, moment.start_s, moment.end_s


def _compare_classes(run: MeasuredRun) -> tuple[ClassComparison, ...]:
    order = {"F": 0, "B": 1, "STEP": 2}
    rows = []
    for key, work in sorted(class_works(run).items(), key=lambda entry: (order[entry[0].kind], entry[0])):
        seconds = [timing.lead_s + timing.busy_s for timing in run.by_class[key]]
        rows.append(
            ClassComparison(
                kind=key.kind,
                stage=key.stage,
                htasks=key.htasks,
                count=len(seconds),
                per_iteration=run.per_iteration[key],
                predicted_s=work.predicted_s,
                median_s=median(seconds),
                mean_s=mean(seconds),
                error=compare(work.predicted_s, median(seconds)).error,
            )
        )
    return tuple(rows)


def _compare_stages(
    run: MeasuredRun, predicted: _Timeline, measured: _Timeline
) -> tuple[StageComparison, ...]:
    rows = []
    works = class_works(run)
    for stage in range(len(run.stages)):
        expected, found = predicted.seconds(stage), measured.seconds(stage)
        steps_s = sum(
            run.per_iteration[key] * work.step_share_s for key, work in works.items() if key.stage == stage
        )
        expected["B"] -= steps_s
        expected["STEP"] += steps_s
        rows.append(
            StageComparison(
                stage=stage,
                forward_s=compare(expected["F"], found["F"]),
                backward_s=compare(expected["B"], found["B"]),
                step_s=compare(expected["STEP"], found["STEP"]),
                waiting_s=compare(expected["waiting"], found["waiting"]),
                between_s=compare(expected["between"], found["between"]),
            )
        )
    return tuple(rows)


def _slowest(run: MeasuredRun, measured: _Timeline) -> SlowIteration:
    step = max(run.steady, key=lambda k: measured.lengths_s[k])
    end_s = measured.ends_s[step]
    start_s = end_s - measured.lengths_s[step]
    found: list[tuple[float, int, str, Literal["in", "before", "message"]]] = []
    for stage, (clocks, timings, moments) in enumerate(
        zip(run.stages, run.timings, measured.played, strict=True)
    ):
        for clock, timing, moment in zip(clocks, timings, moments, strict=True):
            if moment.end_s <= start_s or moment.ready_s >= end_s:
                continue
            usual, name = run.typical[class_of(stage, clock)], str(clock[0])
            work_s = timing.lead_s + timing.busy_s - usual.lead_s - usual.busy_s
            found.append((work_s, stage, name, "in"))
            found.append((timing.gap_s - usual.gap_s, stage, name, "before"))
            found.append((timing.transfer_s - usual.transfer_s, stage, name, "message"))
    excess_s, stage, name, place = max(found, key=lambda entry: entry[0])
    return SlowIteration(
        step=step,
        seconds=measured.lengths_s[step],
        excess_s=measured.lengths_s[step] - median(measured.lengths_s[k] for k in run.steady),
        stage=stage,
        action=name,
        place=place,
        place_excess_s=excess_s,
    )
