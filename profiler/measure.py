"""Measures one operator, at the same time as the other ranks measure it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import cycle

from muxtune.costs.operator_work import operator_work
from muxtune.graph.operators import FWD_ONLY, PHASES, Operator, OperatorSuite, Phase
from muxtune.model import ModelSpec
from profiler.devices import Device
from profiler.rendezvous import Rendezvous
from profiler.timing import Sample, Timer, time_repeatedly


def measure_operator(
    op: Operator,
    model: ModelSpec,
    suite: OperatorSuite,
    device: Device,
    *,
    rendezvous: Rendezvous,
    limit_s: float,
) -> Iterator[tuple[Phase, Sample]]:
    """Build an operator and time its phases.

    In a real pass a layer's weights were last used a whole pass ago, so the operator is built several times
    on a CPU and the copies take turns; on CUDA the timer empties the cache.

    Args:
        op: Any kind that a suite builds.
        model: The backbone.
        suite: Suite that builds it.
        device: Device of this rank.
        rendezvous: Rendezvous of the ranks that measure it at the same time.
        limit_s: Seconds per phase, or for both where they are timed in turn.

    Yields:
        Phase and timings of this rank.
    """
    backward_wanted = op.kind not in FWD_ONLY
    # The layers of a stage take turns by themselves.
    copies = 1 if op.kind == "stage" else device.copies(operator_work(op, "fwd", model).bytes)
    built = [suite.build(op, model, device.name, needs_backward=backward_wanted) for _ in range(copies)]
    forwards = [forward for forward, _ in built]
    backwards = [backward for _, backward in built if backward is not None]
    if op.kind == "stage":  # in turn, as the runtime plays them, which leaves each less in the caches
        pairs = list(zip(forwards, backwards, strict=True))
        yield from zip(PHASES, time_together(pairs, device.timer, rendezvous, limit_s), strict=True)
        return
    for phase, calls in zip(PHASES, (forwards, backwards), strict=True):
        if calls:
            (sample,) = time_together([(call,) for call in calls], device.timer, rendezvous, limit_s)
            yield phase, sample


def time_together(
    copies: Sequence[Sequence[Callable[[], object]]], timer: Timer, rendezvous: Rendezvous, limit_s: float
) -> list[Sample]:
    """Start together; who is done first keeps its core and the memory busy for the others."""
    rendezvous.barrier()
    samples = time_repeatedly(copies, timer, limit_s=limit_s)
    rendezvous.arrive()
    for call in cycle(call for calls in copies for call in calls):
        if rendezvous.all_arrived():
            break
        timer.call_s(call)  # not the call alone, which may leave its work queued for the device
    return samples
