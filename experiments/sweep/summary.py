"""What a sweep comes to, in counts and reasons."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from experiments.sweep.journal import Finished
from experiments.sweep.points import Point
from muxtune.support.tables import format_table

SHOWN_REASONS = 5

_NUMBER = re.compile(r"\d+(\.\d+)?")


class FailureCount(BaseModel):
    """A reason for which points have no plan."""

    model_config = ConfigDict(frozen=True)

    reason: str
    """Reason in the words of the first such point."""
    points: int


class SweepSummary(BaseModel):
    """What ``muxtune sweep --json`` prints."""

    model_config = ConfigDict(frozen=True)

    out: Path
    points: int
    planned: int
    refused: int
    """No such plan exists."""
    failed: int
    """Our own mistake, or a policy's."""
    estimated: int = 0
    """Points that were planned by estimated costs."""
    reused: int
    """Points that were finished before."""
    seconds: float
    failures: tuple[FailureCount, ...]
    """The most frequent first; reasons that differ in numbers alone count as one."""


def summarize(
    points: Sequence[Point], finished: Finished, *, out: Path, reused: int, seconds: float
) -> SweepSummary:
    """Count what became of the points."""
    outcomes = [finished[point.digest] for point in points]
    status = Counter(str(outcome["status"]) for outcome in outcomes)
    reasons: dict[str, list[str]] = {}
    for outcome in outcomes:
        if outcome["failure"] is not None:
            text = str(outcome["failure"])
            reasons.setdefault(_NUMBER.sub("#", text), []).append(text)
    failures = [FailureCount(reason=texts[0], points=len(texts)) for texts in reasons.values()]
    return SweepSummary(
        out=out,
        points=len(points),
        planned=status["planned"],
        refused=status["refused"],
        failed=status["failed"],
        estimated=sum(outcome.get("costs_kind") == "estimated" for outcome in outcomes),
        reused=reused,
        seconds=seconds,
        failures=tuple(sorted(failures, key=lambda failure: -failure.points)),
    )


def summary_text(summary: SweepSummary) -> str:
    """The counts in a sentence, and the most frequent reasons in a table."""
    counts = f"{summary.planned} planned, {summary.refused} refused, {summary.failed} failed"
    head = (
        f"{summary.points} points: {counts}; {summary.reused} were finished before; "
        f"{summary.seconds:.1f} s\nwritten to {summary.out}"
    )
    if summary.estimated:
        head += f"\n{summary.estimated} planned by estimated costs (column costs_kind)"
    if not summary.failures:
        return head
    shown = summary.failures[:SHOWN_REASONS]
    table = format_table(["why there is no plan", "points"], [[f.reason, str(f.points)] for f in shown])
    others = len(summary.failures) - len(shown)
    return f"{head}\n\n{table}" + (f"\nand {others} other reasons, in the column failure" if others else "")
