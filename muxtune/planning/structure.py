"""The decisions of a plan, before they are priced and written down."""

from __future__ import annotations

from dataclasses import dataclass

from muxtune.alignment import HTaskShape
from muxtune.schedule import Template


@dataclass(frozen=True, slots=True, kw_only=True)
class HTaskChoice:
    """Tasks that are fused, how their data is aligned, and on which copy of the backbone they run."""

    task_ids: tuple[str, ...]
    shape: HTaskShape
    instance: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanStructure:
    """Everything that a policy decides."""

    htasks: tuple[HTaskChoice, ...]
    buckets: tuple[tuple[int, ...], ...]
    """hTask positions per bucket, in order of injection."""
    template: Template
    layers_per_stage: tuple[int, ...]

    @property
    def pp(self) -> int:
        """Pipeline stages."""
        return len(self.layers_per_stage)

    @property
    def microbatches(self) -> tuple[int, ...]:
        """Per hTask and step."""
        return tuple(htask.shape.microbatches for htask in self.htasks)
