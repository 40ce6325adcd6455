"""What a planner asks of operator costs."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

from muxtune.operators import Operator, Phase
from muxtune.plan import CostsRef


class CostModel(Protocol):
    """Latency of operators on one device."""

    @property
    def ref(self) -> CostsRef:
        """Identity of these costs, for the plan."""
        ...

    def latency_s(self, op: Operator, phase: Phase) -> float:
        """Seconds of one operator."""
        ...

    def action_s(self, operators_s: float, phase: Phase) -> float:
        """Seconds of a whole action whose operators sum up to ``operators_s``."""
        ...

    def exploring(self) -> AbstractContextManager[None]:
        """Where a search prices candidates: shapes that were not measured go without a warning inside."""
        ...
