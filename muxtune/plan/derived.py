"""The part of a plan that follows from its decisions, data and costs, and is never edited by hand."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from muxtune.model import BackboneDigest
from muxtune.plan.launch_orders import ClockLaunches
from muxtune.schedule import Kind
from muxtune.support.strict_models import StrictModel


class MicrobatchShape(StrictModel):
    """Static shape of an hTask's micro-batches."""

    microbatches: int = Field(gt=0)
    """Micro-batches of an optimizer step, on each replica."""
    tokens_per_microbatch: int = Field(gt=0)
    """Tokens of the stream, padding included."""


class Derived(StrictModel):
    """What follows from the decisions; ``muxtune plan --reprice`` makes it anew."""

    backbone: BackboneDigest | None = None
    """Digests of the model's directory when the plan was made; a changed one is refused. Null for a
    preset."""
    dataset_sha256: tuple[str | None, ...] = Field(min_length=1)
    """Per task, digest of its file when the plan was made; a changed file is refused. Null for drawn
    lengths."""
    init_sha256: tuple[str | None, ...] = ()
    """Per task, digest of the saved adapter that it starts from; a changed one is refused. Null for
    tasks that start from their seed; empty where all do."""
    htasks: tuple[MicrobatchShape, ...] = Field(min_length=1)
    """Shapes of the micro-batches of each hTask."""
    schedule: tuple[tuple[tuple[Kind, int, int], ...], ...]
    """Per stage, actions ["F", hTask, micro-batch], ["B", ...], ["STEP", hTask, step]."""
    contention: float = Field(default=0.0, ge=0)
    """While computation and communication run at once, each runs at the rate 1 / (1 + contention). From the
    costs."""
    launches: tuple[ClockLaunches, ...] = ()
    """Launch orders of every kind of clock that is played with overlap; empty where nothing overlaps. A plan
    without them is executed without overlap."""
    useful_flops: Annotated[float, Field(ge=0)] | None = None
    """Floating-point operations of an iteration that the users' own tokens need, see
    :mod:`muxtune.planning.exact.utilization`."""
    cost_notes: tuple[str, ...] = ()
    """What is doubtful about the costs for this plan: sentences on where they come from, on what was not
    measured, and on fits that rest on their bounds."""
