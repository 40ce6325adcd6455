"""Result of a simulation."""

from __future__ import annotations

from dataclasses import dataclass

from muxtune.plan import Predicted
from muxtune.trace import Span


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationReport:
    """What a plan would do."""

    spans: tuple[Span, ...]
    """Compute and communication of every stage, seconds from the start of the schedule."""
    predicted: Predicted
    """Same keys as ``predicted`` in the plan."""
