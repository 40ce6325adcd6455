"""Memory of a plan's stages, before it is written down and after."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

from muxtune.cluster import DeviceSpec
from muxtune.costs.compose import MicrobatchWork
from muxtune.memory import (
    CUDA_ALLOCATOR_FRACTION,
    HTaskLoad,
    Sharding,
    StageLoad,
    StageMemory,
    backbone_bytes,
    htask_load,
    table_bytes,
)
from muxtune.model import ModelSpec
from muxtune.peft import LayerRuns, Specs, stages_layers
from muxtune.plan import Plan
from muxtune.planning.decisions.structure import HTaskChoice, Mesh, PlanStructure
from muxtune.planning.exact.works import sample_works
from muxtune.schedule import Action
from muxtune.tasks import load_task_data, load_tokenizer


class StructureMemory:
    """Prices structures in bytes; what it computes for an hTask on a kind of stage it computes once.

    Args:
        model: Backbone.
        device: Device of every rank.
        pefts: Methods of all tasks.
        fullest_works: The fullest micro-batch of an hTask, or those of its fullest carry group.
    """

    def __init__(
        self,
        model: ModelSpec,
        device: DeviceSpec,
        pefts: Specs,
        fullest_works: Callable[[HTaskChoice], Sequence[MicrobatchWork]],
    ) -> None:
        self._model = model
        self._device = device
        self._pefts = pefts
        self._fullest_works = fullest_works
        self._htask_load = lru_cache(maxsize=None)(self._measure_load)

    def stages(
        self, structure: PlanStructure, actions: Sequence[Sequence[Action]] | None = None
    ) -> tuple[StageMemory, ...]:
        """Bytes that each stage needs at its peak.

        Args:
            structure: Decisions of the plan.
            actions: Schedule of the structure, per stage; without it, a bound that no 1F1B schedule of it
                exceeds.
        """
        memory = []
        for stage in range(structure.pp):
            load = self._stage_load(structure, stage)
            memory.append(
                load.bound(structure.microbatches)
                if actions is None
                else load.peak(actions[stage], structure.microbatches)
            )
        return tuple(peak.with_allocator(self._allocator_fraction) for peak in memory)

    def fullest(
        self,
        structure: PlanStructure,
        actions: Sequence[Sequence[Action]],
        *,
        give_up_bytes: float = math.inf,
    ) -> tuple[int, StageMemory]:
        """The stage that needs most, and what it needs at its peak.

        Args:
            structure: Decisions of the plan.
            actions: Schedule of the structure, per stage.
            give_up_bytes: A stage that needs more than these is answered with, by the first moment that does;
                it may not be the fullest.
        """
        fraction = self._allocator_fraction
        # What the allocator adds is rounded: a moment must exceed the limit after that, too.
        most_bytes = (give_up_bytes + 0.5) / (1 + fraction)
        fullest: tuple[int, StageMemory] | None = None
        for stage in range(structure.pp):
            load = self._stage_load(structure, stage)
            peak = load.peak(actions[stage], structure.microbatches, give_up_bytes=most_bytes).with_allocator(
                fraction
            )
            if fullest is None or peak.total_bytes > fullest[1].total_bytes:
                fullest = stage, peak
            if peak.total_bytes > give_up_bytes:
                break
        assert fullest is not None, "a mesh has stages"
        return fullest

    @property
    def _allocator_fraction(self) -> float:
        return CUDA_ALLOCATOR_FRACTION if self._device.kind == "cuda" else 0.0

    def _stage_load(self, structure: PlanStructure, stage: int) -> StageLoad:
        mesh = structure.mesh
        first, last = stage == 0, stage == mesh.pp - 1
        layers = stages_layers(self._model, self._pefts, mesh.layers_per_stage)[stage]
        sharding = Sharding(tp=mesh.tp)
        instances = len({htask.instance for htask in structure.htasks})
        in_flight = structure.clocks_in_flight
        return StageLoad(
            first=first,
            last=last,
            in_flight=in_flight[stage],
            in_flight_before=in_flight[stage - 1] if structure.in_flight and stage else None,
            buckets=structure.buckets if structure.orchestration.shares_clocks else (),
            backbone_bytes=instances
            * backbone_bytes(self._model, layers, first=first, last=last, sharding=sharding),
            table_bytes=instances * table_bytes(self._model),
            htasks=tuple(
                self._htask_load(htask, layers, first, last, sharding) for htask in structure.htasks
            ),
        )

    def _measure_load(
        self, htask: HTaskChoice, layers: LayerRuns, first: bool, last: bool, sharding: Sharding
    ) -> HTaskLoad:
        return htask_load(
            self._model,
            layers,
            first=first,
            last=last,
            works=self._fullest_works(htask),
            sharding=sharding,
            device=self._device.kind,
        )


def plan_memory(plan: Plan) -> tuple[StageMemory, ...]:
    """What ``predicted.peak_memory_bytes`` is made of, per stage. Reads the datasets.

    Raises:
        UserError: A dataset cannot be read.
    """
    tokenizer = load_tokenizer(plan.model)
    data = {task.id: load_task_data(task, plan.model, tokenizer) for task in plan.tasks}
    structure = PlanStructure(
        htasks=tuple(
            HTaskChoice(task_ids=htask.task_ids, shape=plan.shape(htask.id), instance=htask.instance)
            for htask in plan.htasks
        ),
        buckets=plan.buckets,
        template=plan.template,
        injection=plan.injection,
        in_flight=plan.in_flight,
        orchestration=plan.orchestration,
        mesh=Mesh(plan.parallelism.layers_per_stage, plan.parallelism.tp, plan.parallelism.dp),
    )
    attention = plan.execution.attention
    memory = StructureMemory(
        plan.model,
        plan.cluster.device,
        plan.pefts,
        lambda htask: sample_works(htask, data, attention=attention).fullest,
    )
    return memory.stages(structure, plan.actions)
