"""Result of a simulation."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from muxtune.plan import Predicted
from muxtune.schedule import ActionSpan, save_trace
from sim.operators import OperatorLog


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationReport:
    """What a plan would do."""

    spans: tuple[ActionSpan, ...]
    """Compute and communication of every stage, seconds from the start of the schedule."""
    predicted: Predicted
    """Numbers with the keys of ``predicted`` in the plan."""
    operators: OperatorLog = field(default_factory=OperatorLog)
    """What the actions consist of; empty where whole clocks were played."""

    def save_trace(self, path: Path) -> None:
        """Write the timeline as a Chrome/Perfetto trace, operators inside their actions."""
        save_trace(path, self.spans, "simulated", self.operators)
