"""What a timeline means in numbers: the ``predicted`` part of a plan, whoever made the timeline.

The planner hands in the spans of the recurrence, the simulator those of its engine; both must mean the same
by "iteration time", so the arithmetic stands here, once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from muxtune.batches import AlignmentReport
from muxtune.costs.gpu import peak_flops_per_s
from muxtune.plan.decisions import Decisions
from muxtune.plan.derived import Derived
from muxtune.plan.plan import Plan
from muxtune.plan.predicted import ClockSeconds, Predicted
from muxtune.schedule import (
    COMPUTE,
    ActionSpan,
    ClockTimes,
    StageTimes,
    Template,
    iteration_clocks,
    iteration_ends_s,
    iteration_work_s,
    makespan_s,
    steady_iteration_s,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class IterationTokens:
    """Tokens of one iteration, that is of one optimizer step of every task."""

    all: float
    """Everything that goes through the backbone, on all replicas; see
    :meth:`muxtune.batches.HTaskShape.step_tokens`."""
    billed: float
    """Examples padded to their task's own max length."""
    effective: float
    """Tokens of examples; the mean over the steps."""


def iteration_tokens(plan: Plan) -> IterationTokens:
    """Tokens of one iteration of a plan, without its data.

    The effective tokens are those that the planner counted; they come back out of its prediction.
    """
    predicted = plan.predicted
    return IterationTokens(
        all=sum(plan.step_tokens(htask.id) for htask in plan.htasks),
        billed=sum(task.global_batch_size * task.max_length for task in plan.tasks),
        effective=predicted.effective_tokens_per_s * predicted.iteration_s,
    )


def stage_times(plan: Plan) -> StageTimes:
    """The durations that a plan was made with."""
    p = plan.predicted
    clocks = None
    if plan.shared_buckets is not None:
        seconds = {(clock.kind, clock.htasks): clock.seconds for clock in p.clock_s}
        clocks = ClockTimes(buckets=plan.shared_buckets, microbatches=plan.microbatches, seconds=seconds)
    return StageTimes(fwd_s=p.fwd_s, bwd_s=p.bwd_s, p2p_s=p.p2p_s, clocks=clocks)


def theoretical_bubble_fraction(
    buckets: Sequence[Sequence[int]],
    microbatches: Sequence[int],
    *,
    pp: int,
    template: Template,
    instances: Sequence[int] | None = None,
    co_scheduled: bool = False,
    injection: Sequence[int] = (),
) -> float:
    """Share of waiting if all clocks took equally long and transfers no time.

    A pipeline that fills, plays ``m`` clocks and drains stands still for ``pp - 1`` of every stage's
    ``m + pp - 1`` turns. Every instance's turn does so in an iteration, which then has the fraction

        segments * (pp - 1) / (clocks of the iteration + segments * (pp - 1))

    With a single instance ``continuous`` and ``lorapp`` drain no segment: 0, the steady state where enough
    other hTasks stand between the last micro-batch of an hTask's step and the first of its next. With
    several, the last turn of an iteration goes on in the next one if that begins with the same instance.

    Args:
        buckets: hTasks per bucket, in order of injection.
        microbatches: Micro-batches per hTask and step.
        pp: Pipeline stages.
        template: Template of the schedule.
        instances: Backbone instance per hTask, one for all by default.
        co_scheduled: The hTasks of a bucket share clocks.
        injection: Own order of an iteration's micro-batches.
    """
    rotation = iteration_clocks(buckets, microbatches, co_scheduled=co_scheduled, injection=injection)
    turns = [key for key, _ in groupby(instances[htasks[0]] if instances else 0 for _, htasks in rotation)]
    segments = len(turns)
    if template in {"continuous", "lorapp"} and turns[0] == turns[-1]:
        segments -= 1
    waiting = segments * (pp - 1)
    return waiting / (len(rotation) + waiting)


def predict_plan(plan: Plan, spans: Sequence[ActionSpan]) -> Predicted:
    """What a plan predicts by another timeline of its schedule, or of a longer one."""
    return predict(
        spans,
        times=stage_times(plan),
        microbatches=plan.microbatches,
        tokens=iteration_tokens(plan),
        peak_memory_bytes=plan.predicted.peak_memory_bytes,
        theoretical_bubble_fraction=plan.predicted.theoretical_bubble_fraction,
        alignment=plan.predicted.alignment,
        ideal_s=ideal_iteration_s(plan.decisions, plan.derived),
    )


def ideal_iteration_s(decisions: Decisions, derived: Derived) -> float | None:
    """Seconds that the useful operations of an iteration would take at the peak rate of all ranks used.

    None where the peak of the device in the backbone's dtype is not known; the MFU is this over the
    iteration's length.
    """
    peak = peak_flops_per_s(decisions.cluster.device.name, decisions.model.dtype)
    if peak is None or derived.useful_flops is None:
        return None
    return derived.useful_flops / (peak * decisions.parallelism.ranks)


def predict(
    spans: Sequence[ActionSpan],
    *,
    times: StageTimes,
    microbatches: Sequence[int],
    tokens: IterationTokens,
    peak_memory_bytes: Sequence[int],
    theoretical_bubble_fraction: float | None = None,
    alignment: AlignmentReport | None = None,
    ideal_s: float | None = None,
) -> Predicted:
    """Numbers of a schedule that was played from its first to its last action.

    A single scheduled iteration stands for one that repeats after a drain: stage 0 is busy at both its ends,
    so the period is the makespan.

    Args:
        spans: Timeline, with every STEP; communication spans do not matter.
        times: Durations that it was played with.
        microbatches: Micro-batches per hTask and iteration.
        tokens: Tokens per iteration.
        peak_memory_bytes: Peak memory of each stage.
        theoretical_bubble_fraction: What the function of that name gives.
        alignment: Tokens under other alignments.
        ideal_s: What :func:`ideal_iteration_s` gives.
    """
    compute = [span for span in spans if span.stream == COMPUTE]
    iteration_s = steady_iteration_s(compute)
    work_s = iteration_work_s(times, microbatches)
    busy = sum(work_s) / (len(work_s) * iteration_s)
    return Predicted(
        iteration_s=iteration_s,
        tokens_per_s=tokens.all / iteration_s,
        billed_tokens_per_s=tokens.billed / iteration_s,
        effective_tokens_per_s=tokens.effective / iteration_s,
        mfu=None if ideal_s is None else ideal_s / iteration_s,
        peak_memory_bytes=tuple(peak_memory_bytes),
        bubble_fraction=max(0.0, 1 - busy),  # rounding alone can make it negative
        theoretical_bubble_fraction=theoretical_bubble_fraction,
        lower_bound_s=max(work_s),
        scheduled_iterations=len(iteration_ends_s(compute)),
        makespan_s=makespan_s(compute),
        fwd_s=tuple(map(tuple, times.fwd_s)),
        bwd_s=tuple(map(tuple, times.bwd_s)),
        p2p_s=tuple(times.p2p_s),
        clock_s=tuple(
            ClockSeconds(kind=kind, htasks=htasks, seconds=tuple(seconds))
            for (kind, htasks), seconds in (times.clocks.seconds.items() if times.clocks else ())
        ),
        alignment=alignment,
    )
