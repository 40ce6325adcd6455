"""The decisions of a plan, before they are priced and written down."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from muxtune.batches import Alignment, HTaskShape
from muxtune.cluster import ClusterSpec
from muxtune.placement import Placement
from muxtune.plan import Orchestration
from muxtune.schedule import Template, clocks_in_flight

SEQUENTIAL = Orchestration()
"""Operators one after the other."""


class Layout(NamedTuple):
    """How the data of an hTask is laid out; with its tasks it says what shape the hTask has."""

    alignment: Alignment
    chunk_tokens: int | None = None
    """Tokens of a chunk under ``chunk``."""
    carry: int = 1
    """Micro-batches of a carry group, over which the sequences of a declared micro-batch are cut."""

    def __str__(self) -> str:
        if self.alignment != "chunk":
            return self.alignment
        carried = f" over {self.carry} micro-batches" if self.carry > 1 else ""
        return f"chunks of {self.chunk_tokens}{carried}"


@dataclass(frozen=True, slots=True, kw_only=True)
class HTaskChoice:
    """Tasks that are fused, how their data is aligned, and on which copy of the backbone they run."""

    task_ids: tuple[str, ...]
    shape: HTaskShape
    instance: int = 0

    @property
    def layout(self) -> Layout:
        """Layout that led to the shape."""
        chunk_tokens = self.shape.row_tokens if self.shape.alignment == "chunk" else None
        return Layout(self.shape.alignment, chunk_tokens, self.shape.carry)


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

    def on(self, cluster: ClusterSpec) -> Placement:
        """Where its ranks stand on a cluster."""
        return Placement(self.tp, self.pp, self.dp, cluster.devices_per_node)

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
    injection: tuple[int, ...] = ()
    """hTask positions of an iteration's micro-batches in the order in which they enter the pipeline; empty
    where buckets and template say it."""
    in_flight: tuple[int, ...] = ()
    """Per stage, clocks that may be in flight; empty where the template says it."""

    @property
    def clocks_in_flight(self) -> tuple[int, ...]:
        """Per stage, clocks that may be in flight, by ``in_flight`` or the template."""
        return tuple(
            clocks_in_flight(
                self.template,
                self.microbatches,
                pp=self.pp,
                stage=stage,
                instances=[htask.instance for htask in self.htasks],
                carries=self.carries,
                in_flight=self.in_flight,
            )
            for stage in range(self.pp)
        )

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
