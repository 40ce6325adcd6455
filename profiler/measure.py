"""Measures one operator, at the same time as the other ranks measure it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle

from muxtune.costs.work import operator_work
from muxtune.model import ModelSpec
from muxtune.operators import FWD_ONLY, Operator, OperatorSuite, Phase
from profiler.rendezvous import Rendezvous
from profiler.timing import Sample, Timer, time_repeatedly

_COLD_BYTES = 8 << 20
"""An operator runs on so much memory before it comes back to the same: more than a core's own caches hold."""

_MAX_COPIES = 4


def measure_operator(
    op: Operator,
    model: ModelSpec,
    suite: OperatorSuite,
    device: str,
    *,
    timer: Timer,
    rendezvous: Rendezvous,
    limit_s: float,
) -> Iterator[tuple[Phase, Sample]]:
    """Build an operator and time its phases.

    In a real pass a layer's weights were last used a whole pass ago, so the operator is built several times
    on a CPU and the copies take turns; on CUDA the timer empties the cache.

    Args:
        op: Any kind but ``p2p``.
        model: The backbone.
        suite: Builds it.
        device: ``cpu`` or ``cuda[:N]``.
        timer: Of the device.
        rendezvous: Of the ranks that measure it at the same time.
        limit_s: Seconds per phase.

    Yields:
        Phase and timings of this rank.
    """
    copies = _copies(op, model) if device == "cpu" else 1
    backward_wanted = op.kind not in FWD_ONLY
    built = [suite.build(op, model, device, needs_backward=backward_wanted) for _ in range(copies)]
    yield "fwd", _time_together([forward for forward, _ in built], timer, rendezvous, limit_s)
    backwards = [backward for _, backward in built if backward is not None]
    if backwards:
        yield "bwd", _time_together(backwards, timer, rendezvous, limit_s)


def _time_together(
    functions: Sequence[Callable[[], object]], timer: Timer, rendezvous: Rendezvous, limit_s: float
) -> Sample:
    """Start together; who is done first keeps its core and the memory busy for the others."""
    rendezvous.meet()
    sample = time_repeatedly(functions, timer, limit_s=limit_s)
    rendezvous.arrive()
    for function in cycle(functions):
        if rendezvous.all_arrived():
            break
        rendezvous.check_parent()
        function()
    return sample


def _copies(op: Operator, model: ModelSpec) -> int:
    if op.kind == "stage":
        return 1  # its layers already take turns
    bytes_ = operator_work(op, "fwd", model).bytes
    return max(1, min(_MAX_COPIES, math.ceil(_COLD_BYTES / bytes_)))
