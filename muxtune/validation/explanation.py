"""Why a run's iterations take longer or shorter than predicted, as parts that add up to the difference.

The schedule is replayed with predicted durations. What all forwards and backwards have in common, that they
take at least so much longer (or shorter), is the device's part. Then causes are switched on one after the
other: the measured medians of forwards, backwards and STEPs, stage by stage, of messages, of what ranks
exchange at STEPs, and of the time between actions. A part is by how much the median iteration changes. What
causes share, such as two stages that are both slower, would all go to the first of them; so they are switched
on in order and in reverse, and a part is the mean of both. Then every action gets the duration that it had.
What is left is shown as such.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import cached_property
from statistics import median
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

from muxtune.schedule import ClockActions
from muxtune.support.tables import show_seconds
from muxtune.validation.classes import class_works
from muxtune.validation.measured import ClockClass, MeasuredRun, class_of
from muxtune.validation.replay import (
    ClockTiming,
    iteration_ends_s,
    iteration_lengths_s,
    replay,
    stages_meet,
)

CauseKind = Literal[
    "schedule", "device", "F", "B", "STEP", "messages", "exchange", "between", "variation", "rest"
]

_STRICT = ConfigDict(frozen=True, extra="forbid")


class DifferencePart(BaseModel):
    """What one cause adds to an iteration."""

    model_config = _STRICT

    cause: CauseKind
    stage: int | None
    """Stage of the F, B or STEP; None for other causes."""
    seconds: float
    """Measured less predicted seconds."""
    meaning: str
    """One sentence on what the cause means."""


class IterationExplanation(BaseModel):
    """The difference of iteration time and its parts."""

    model_config = _STRICT

    predicted_s: float
    measured_s: float
    parts: tuple[DifferencePart, ...]
    """Causes, whose seconds add up to ``measured_s - predicted_s``; the largest first, whatever its sign."""

    @property
    def difference_s(self) -> float:
        """Measured less predicted seconds."""
        return self.measured_s - self.predicted_s


class Cause(NamedTuple):
    """A switch of the replay."""

    kind: CauseKind
    stage: int | None = None


_DEVICE = Cause("device")

_MANY = 2.0
"""Ratios above it are said as such, and not in per cent."""


def explain_difference(run: MeasuredRun, *, predicted_s: float, measured_s: float) -> IterationExplanation:
    """Split ``measured_s - predicted_s``.

    Args:
        run: Clocks of the run.
        predicted_s: Iteration time of the plan.
        measured_s: Median over the steady iterations.
    """
    model = _ReplayedRun(run)
    scheduled_s = model.iteration_s(())
    causes = model.causes()
    device_s = model.iteration_s((_DEVICE,))
    effects = _average_effects(model, causes, device_s)
    typical_s = model.iteration_s([_DEVICE, *causes])
    varied_s = model.iteration_s([_DEVICE, *causes], each_action=True)
    effects = {
        Cause("schedule"): scheduled_s - predicted_s,
        _DEVICE: device_s - scheduled_s,
        **effects,
        Cause("variation"): varied_s - typical_s,
        Cause("rest"): measured_s - varied_s,
    }
    parts = [
        DifferencePart(cause=cause.kind, stage=cause.stage, seconds=seconds, meaning=_meaning(cause, model))
        for cause, seconds in effects.items()
    ]
    parts.sort(key=lambda part: -abs(part.seconds))  # stable: equals in order of time
    return IterationExplanation(predicted_s=predicted_s, measured_s=measured_s, parts=tuple(parts))


class _ReplayedRun:
    """A run's schedule, played with some measured durations and some predicted ones."""

    def __init__(self, run: MeasuredRun) -> None:
        self.run = run
        self.works = class_works(run)
        self._classes = [
            [class_of(stage, clock) for clock in clocks] for stage, clocks in enumerate(run.stages)
        ]

    @cached_property
    def device_factor(self) -> float:
        """What all forwards and backwards have in common; 1 if some take longer and some shorter.

        That class counts whose duration is the closest to its prediction.
        """
        ratios = [
            (work.measured_s + work.step_share_s) / work.predicted.busy_s
            for work in self.works.values()
            if work.predicted.busy_s
        ]
        return max(1.0, min(ratios, default=1.0)) * min(1.0, max(ratios, default=1.0))

    def causes(self) -> list[Cause]:
        """Everything that can be switched on after the device's part and that this run has, in order."""
        stages = range(len(self.run.stages))
        causes = [Cause(kind, stage) for kind in ("F", "B", "STEP") for stage in stages]
        if len(stages) > 1:
            causes.append(Cause("messages"))
        if any(key.kind == "STEP" and timing.sync_s for key, timing in self.run.typical.items()) or any(
            stages_meet(self.run.plan, clock) for clock in self.run.stages[0]
        ):
            causes.append(Cause("exchange"))
        return [*causes, Cause("between")]

    def iteration_s(self, causes: Collection[Cause], *, each_action: bool = False) -> float:
        """Median over the steady iterations.

        Args:
            causes: What is as measured; the rest is as predicted. A stage's own causes replace the device's.
            each_action: Every action takes what it took, and not what its class does. Needs all causes.
        """
        active = frozenset(causes)
        by_class = {key: self._timing(key, active) for key in self.works}

        def timing(stage: int, position: int) -> ClockTiming:
            usual = by_class[self._classes[stage][position]]
            if not each_action:
                return usual
            own = self.run.timings[stage][position]
            return replace(usual, lead_s=own.lead_s, busy_s=own.busy_s)

        def meets(clock: ClockActions) -> bool:
            return Cause("exchange") in active and stages_meet(self.run.plan, clock)

        played = replay(self.run.stages, timing, meets)
        lengths_s = iteration_lengths_s(iteration_ends_s(self.run.stages, played))
        return median(lengths_s[k] for k in self.run.steady)

    def _timing(self, key: ClockClass, active: frozenset[Cause]) -> ClockTiming:
        work = self.works[key]
        timing, typical = work.predicted, work.typical
        if _DEVICE in active:
            timing = replace(timing, busy_s=timing.busy_s * self.device_factor)
        if Cause(key.kind, key.stage) in active:
            timing = replace(timing, lead_s=typical.lead_s, busy_s=typical.busy_s + work.step_share_s)
        if Cause("STEP", key.stage) in active:  # its time is no longer in the backwards
            timing = replace(timing, busy_s=timing.busy_s - work.step_share_s)
        if Cause("messages") in active:
            timing = replace(timing, transfer_s=typical.transfer_s)
        if Cause("exchange") in active:
            timing = replace(timing, sync_s=typical.sync_s)
        if Cause("between") in active:
            timing = replace(timing, gap_s=typical.gap_s)
        return timing


def _average_effects(model: _ReplayedRun, causes: Sequence[Cause], start_s: float) -> dict[Cause, float]:
    effects = dict.fromkeys(causes, 0.0)
    for order in (causes, causes[::-1]):
        before_s = start_s
        for number, cause in enumerate(order, start=1):
            after_s = model.iteration_s([_DEVICE, *order[:number]])
            effects[cause] += (after_s - before_s) / 2
            before_s = after_s
    return effects


def _meaning(cause: Cause, model: _ReplayedRun) -> str:
    if cause.stage is not None:
        return _work_meaning(cause.kind, cause.stage, model)
    return {
        "schedule": "these iterations, played with the predicted durations, are not quite the plan's: "
        "it shows fewer of them, or its links queue",
        "device": f"all forwards and backwards take {model.device_factor:.2f} times the predicted or "
        f"{'more' if model.device_factor >= 1 else 'less'}: the device is not as it was when it was measured",
        "messages": "tensors between stages arrive later (or sooner) after their clock than predicted",
        "exchange": "at STEPs ranks wait for each other: sums of gradients or of their norms, not predicted",
        "between": "time between actions, in which a stage neither computes nor waits: not predicted",
        "variation": "actions of one class do not all take their median, and stages wait for the slower ones",
        "rest": "not explained: messages and gaps unlike their medians, and what a replay leaves out",
    }[cause.kind]


def _work_meaning(kind: CauseKind, stage: int, model: _ReplayedRun) -> str:
    """What a stage's actions of one kind take in an iteration, in words."""
    works = [
        (model.run.per_iteration[key], work)
        for key, work in model.works.items()
        if (key.kind, key.stage) == (kind, stage)
    ]
    predicted_s = sum(count * work.predicted_s for count, work in works)
    measured_s = sum(count * work.measured_s for count, work in works)
    names = {"F": "forwards", "B": "backwards", "STEP": "optimizer steps"}
    where = f"{names[kind]} of stage {stage} take {show_seconds(measured_s)} per iteration"
    if not predicted_s:
        return f"{where}, and nothing was predicted for them"
    ratio = measured_s / predicted_s
    factor = f"{ratio:.1f} times" if ratio > _MANY else f"{(ratio - 1) * 100:+.1f} % to"
    return f"{where}, {factor} the predicted {show_seconds(predicted_s)}"
