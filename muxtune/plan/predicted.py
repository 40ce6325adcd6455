"""The part of a plan that says what is expected of it, and to which decisions and costs that belongs."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from muxtune.batches import AlignmentReport
from muxtune.support.strict_models import MOST_SECONDS, Seconds, StrictModel

_Rate = Annotated[float, Field(gt=0, le=1e15)]


class ClockSeconds(StrictModel):
    """Duration of a clock that several hTasks share."""

    kind: Literal["F", "B"]
    """Forward or backward."""
    htasks: tuple[int, ...] = Field(min_length=2)
    """hTasks of the clock, in the order of their bucket."""
    seconds: tuple[Seconds, ...]
    """Seconds on each stage; of a backward with its share of the optimizer steps."""


class Predicted(StrictModel):
    """What the simulator expects; ``muxtune simulate --json`` prints the same keys."""

    iteration_s: Seconds
    """Steady state of one iteration."""
    tokens_per_s: _Rate
    """All tokens that go through the backbone."""
    billed_tokens_per_s: _Rate
    """Examples padded to their own task's ``max_length``."""
    effective_tokens_per_s: _Rate
    """Tokens of the examples."""
    mfu: float | None = Field(default=None, ge=0)
    """Model FLOP utilization: floating-point operations that the users' own tokens need in an iteration, over
    ``iteration_s`` times the peak rate of all ranks used. Null where the peak of the device is not known."""
    peak_memory_bytes: tuple[Annotated[int, Field(gt=0)], ...]
    """Peak memory of each stage."""
    bubble_fraction: float = Field(ge=0, lt=1)
    """Share of the stages' time in steady state in which they wait."""
    theoretical_bubble_fraction: float | None = Field(default=None, ge=0, lt=1)
    """Bubble fraction if all clocks took equally long and transfers no time, see
    :func:`muxtune.plan.theoretical_bubble_fraction`."""
    lower_bound_s: Seconds
    """Work of the busiest stage in one iteration; no schedule of these clocks is faster."""
    scheduled_iterations: int
    """Iterations that the schedule shows."""
    makespan_s: Seconds
    """Seconds of the whole schedule."""
    fwd_s: tuple[tuple[Seconds, ...], ...]
    """[stage][hTask], seconds per micro-batch."""
    bwd_s: tuple[tuple[Seconds, ...], ...]
    """[stage][hTask], seconds per micro-batch, with its share of the optimizer step."""
    p2p_s: tuple[Annotated[float, Field(ge=0, le=MOST_SECONDS)], ...]
    """[hTask], seconds per transfer between neighbouring stages; 0 where there is one stage."""
    clock_s: tuple[ClockSeconds, ...] = ()
    """Seconds of every kind of clock in the schedule that several hTasks share."""
    alignment: AlignmentReport | None = None
    """Tokens per iteration, and what other alignments of the same hTasks would need."""
    made_for: dict[str, str] = Field(default={})
    """Digests of what this was computed from, by field: a plan with other fields is refused, see
    :mod:`muxtune.plan.basis`."""
