"""The decisions of a plan, before they are priced and written down."""

from __future__ import annotations

from dataclasses import dataclass

from muxtune.alignment import HTaskShape
from muxtune.plan import Orchestration
from muxtune.schedule import Template

SEQUENTIAL = Orchestration()
"""Operators one after the other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HTaskChoice:
    """Tasks that are fused, how their data is aligned, and on which copy of the backbone they run."""

    task_ids: tuple[str, ...]
    shape: HTaskShape
    instance: int = 0


@dataclass(frozen=True, slots=True)
class Mesh:
    """How the backbone is spread over ranks: ``tp`` ranks share a stage, ``dp`` replicas share the data."""

    layers_per_stage: tuple[int, ...]
    tp: int = 1
    dp: int = 1

    @property
    def pp(self) -> int:
        """Pipeline stages."""
        return len(self.layers_per_stage)

    @property
    def ranks(self) -> int:
        """Devices that it takes."""
        return self.tp * self.pp * self.dp

    def __str__(self) -> str:
        return f"tp {self.tp}, pp {self.pp}, dp {self.dp}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanStructure:
    """Everything that a policy decides."""

    htasks: tuple[HTaskChoice, ...]
    buckets: tuple[tuple[int, ...], ...]
    """hTask positions per bucket, in order of injection."""
    template: Template
    mesh: Mesh
    orchestration: Orchestration = SEQUENTIAL

    @property
    def layers_per_stage(self) -> tuple[int, ...]:
        """Layers of the backbone on each stage."""
        return self.mesh.layers_per_stage

    @property
    def pp(self) -> int:
        """Pipeline stages."""
        return self.mesh.pp

    @property
    def microbatches(self) -> tuple[int, ...]:
        """Per hTask and step, on each replica."""
        return tuple(htask.shape.microbatches for htask in self.htasks)

    @property
    def carries(self) -> tuple[int, ...]:
        """Micro-batches of a carry group, per hTask."""
        return tuple(htask.shape.carry for htask in self.htasks)
