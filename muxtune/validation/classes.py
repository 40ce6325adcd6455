"""What a class of clocks was predicted to take, and what it typically took."""

from __future__ import annotations

from dataclasses import dataclass

from muxtune.plan import stage_times
from muxtune.schedule import StageTimes
from muxtune.validation.measured import ClockClass, MeasuredRun
from muxtune.validation.replay import ClockTiming


@dataclass(frozen=True, slots=True)
class ClassWork:
    """Timing of a class of clocks, predicted and measured.

    A plan has the optimizer's time as a share of the backwards, and does not say how much that is. It counts
    as what a backward's own measured time leaves of its prediction, but as no more than the STEPs take.
    """

    predicted: ClockTiming
    """Timing as the plan is played: backwards with their share, STEPs without time."""
    typical: ClockTiming
    """Measured medians."""
    step_share_s: float
    """Seconds of the optimizer step that one backward has in the plan."""
    predicted_s: float
    """Computing in one clock, with the optimizer's time at the STEP."""

    @property
    def measured_s(self) -> float:
        """Computing in one clock, typically."""
        return self.typical.lead_s + self.typical.busy_s


def class_works(run: MeasuredRun) -> dict[ClockClass, ClassWork]:
    """Work of every class that a run played."""
    times = stage_times(run.plan)
    shares_s = {key: _step_share_s(run, times, key) for key in run.typical if key.kind == "B"}
    works = {}
    for key, typical in run.typical.items():
        predicted = predicted_timing(times, key)
        own_s = predicted.busy_s - shares_s.get(key, 0.0)
        if key.kind == "STEP":
            own_s = _predicted_step_s(run, shares_s, key)
        works[key] = ClassWork(predicted, typical, shares_s.get(key, 0.0), own_s)
    return works


def predicted_timing(times: StageTimes, key: ClockClass) -> ClockTiming:
    """What a plan plays a class of clocks with."""
    if key.kind == "STEP":
        return ClockTiming(busy_s=0.0)
    busy_s = times.clock_s("F" if key.kind == "F" else "B", key.htasks)[key.stage]
    return ClockTiming(transfer_s=times.transfers_s(key.htasks), busy_s=busy_s)


def _step_share_s(run: MeasuredRun, times: StageTimes, key: ClockClass) -> float:
    typical = run.typical[key]
    left_s = predicted_timing(times, key).busy_s - typical.lead_s - typical.busy_s
    return min(max(0.0, left_s), sum(_step_part_s(run, key.stage, h) for h in key.htasks))


def _step_part_s(run: MeasuredRun, stage: int, htask: int) -> float:
    """The typical STEP of an hTask, divided among its backwards."""
    step = run.typical[ClockClass(stage, "STEP", (htask,))]
    return (step.lead_s + step.busy_s) / run.plan.microbatches[htask]


def _predicted_step_s(run: MeasuredRun, shares_s: dict[ClockClass, float], key: ClockClass) -> float:
    """What the backwards leave for one STEP; those that hTasks share leave it in proportion to STEPs."""
    (htask,) = key.htasks
    own_s, steps = _step_part_s(run, key.stage, htask), run.per_iteration[key]
    if not own_s or not steps:
        return 0.0
    return sum(
        share_s
        * run.per_iteration[other]
        / steps
        * own_s
        / sum(_step_part_s(run, key.stage, h) for h in other.htasks)
        for other, share_s in shares_s.items()
        if other.stage == key.stage and htask in other.htasks
    )
