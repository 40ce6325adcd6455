"""What a timeline means in numbers: the ``predicted`` part of a plan, whoever made the timeline.

The planner hands in the spans of the recurrence, the simulator those of its engine; both must mean the same
by "iteration time", so the arithmetic stands here, once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from muxtune.plan import Plan, Predicted
from muxtune.timeline import StageTimes, lower_bound_s, makespan_s, steady_iteration_s
from muxtune.trace import COMPUTE, Span, iteration_ends_s


@dataclass(frozen=True, slots=True, kw_only=True)
class IterationTokens:
    """Tokens of one iteration, that is of one optimizer step of every task."""

    all: float
    """Everything that goes through the backbone."""
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
        all=sum(h.microbatches * h.tokens_per_microbatch for h in plan.htasks),
        billed=sum(task.global_batch_size * task.max_length for task in plan.tasks),
        effective=predicted.effective_tokens_per_s * predicted.iteration_s,
    )


def stage_times(plan: Plan) -> StageTimes:
    """The durations that a plan was made with."""
    p = plan.predicted
    return StageTimes(fwd_s=p.fwd_s, bwd_s=p.bwd_s, p2p_s=p.p2p_s)


def predict(
    spans: Sequence[Span],
    *,
    times: StageTimes,
    microbatches: Sequence[int],
    tokens: IterationTokens,
    peak_memory_bytes: Sequence[int],
) -> Predicted:
    """Numbers of a schedule that was played from its first to its last action.

    A single scheduled iteration stands for one that repeats after a drain: stage 0 is busy at both its ends,
    so the period is the makespan.

    Args:
        spans: Timeline, with every STEP; communication spans do not matter.
        times: Durations that it was played with.
        microbatches: Per hTask and iteration.
        tokens: Per iteration.
        peak_memory_bytes: Per stage.
    """
    compute = [span for span in spans if span.stream == COMPUTE]
    iteration_s = steady_iteration_s(compute)
    pp = len(times.fwd_s)
    busy_s = sum(
        m * (f + b)
        for fwd, bwd in zip(times.fwd_s, times.bwd_s, strict=True)
        for m, f, b in zip(microbatches, fwd, bwd, strict=True)
    )
    return Predicted(
        iteration_s=iteration_s,
        tokens_per_s=tokens.all / iteration_s,
        billed_tokens_per_s=tokens.billed / iteration_s,
        effective_tokens_per_s=tokens.effective / iteration_s,
        peak_memory_bytes=tuple(peak_memory_bytes),
        bubble_fraction=max(0.0, 1 - busy_s / (pp * iteration_s)),  # rounding alone can make it negative
        lower_bound_s=lower_bound_s(times, microbatches),
        scheduled_iterations=len(iteration_ends_s(compute)),
        makespan_s=makespan_s(compute),
        fwd_s=tuple(map(tuple, times.fwd_s)),
        bwd_s=tuple(map(tuple, times.bwd_s)),
        p2p_s=tuple(times.p2p_s),
    )
