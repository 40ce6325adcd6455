"""Memory of a plan's stages, before it is written down and after."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

from muxtune.cluster import DeviceSpec
from muxtune.costs.compose import MicrobatchWork
from muxtune.dataset import load_task_data
from muxtune.injection import clocks_in_flight
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
from muxtune.plan import Plan
from muxtune.planning.structure import HTaskChoice, Mesh, PlanStructure
from muxtune.planning.works import sample_works
from muxtune.schedule import Action
from muxtune.tokenizer import load_tokenizer


class StructureMemory:
    """Prices structures in bytes; what it computes for an hTask on a kind of stage it computes once.

    Args:
        model: Backbone.
        device: Of every rank.
        largest_work: The fullest micro-batch of an hTask.
    """

    def __init__(
        self, model: ModelSpec, device: DeviceSpec, largest_work: Callable[[HTaskChoice], MicrobatchWork]
    ) -> None:
        self._model = model
        self._device = device
        self._largest_work = largest_work
        self._htask_load = lru_cache(maxsize=None)(self._measure_load)

    def stages(
        self, structure: PlanStructure, actions: Sequence[Sequence[Action]] | None = None
    ) -> tuple[StageMemory, ...]:
        """Bytes that each stage needs at its peak.

        Args:
            structure: What is decided.
            actions: Its schedule, per stage; without it, a bound that no 1F1B schedule of it exceeds.
        """
        memory = []
        for stage in range(structure.pp):
            load = self._stage_load(structure, stage)
            memory.append(
                load.bound(structure.microbatches)
                if actions is None
                else load.peak(actions[stage], structure.microbatches)
            )
        if self._device.kind == "cuda":
            return tuple(peak.with_allocator(CUDA_ALLOCATOR_FRACTION) for peak in memory)
        return tuple(memory)

    def _stage_load(self, structure: PlanStructure, stage: int) -> StageLoad:
        mesh = structure.mesh
        first, last, layers = stage == 0, stage == mesh.pp - 1, mesh.layers_per_stage[stage]
        sharding = Sharding(tp=mesh.tp)
        instances = len({htask.instance for htask in structure.htasks})
        return StageLoad(
            first=first,
            last=last,
            in_flight=clocks_in_flight(
                structure.template,
                structure.microbatches,
                pp=mesh.pp,
                stage=stage,
                instances=[htask.instance for htask in structure.htasks],
                carries=structure.carries,
            ),
            buckets=structure.buckets if structure.orchestration.shares_clocks else (),
            backbone_bytes=instances
            * backbone_bytes(self._model, layers, first=first, last=last, sharding=sharding),
            table_bytes=instances * table_bytes(self._model),
            htasks=tuple(
                self._htask_load(htask, layers, first, last, sharding) for htask in structure.htasks
            ),
        )

    def _measure_load(
        self, htask: HTaskChoice, layers: int, first: bool, last: bool, sharding: Sharding
    ) -> HTaskLoad:
        return htask_load(
            self._model,
            layers,
            first=first,
            last=last,
            work=self._largest_work(htask),
            sharding=sharding,
            device=self._device.kind,
            carry=htask.shape.carry,
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
        orchestration=plan.orchestration,
        mesh=Mesh(plan.parallelism.layers_per_stage, plan.parallelism.tp, plan.parallelism.dp),
    )
    attention = plan.execution.attention
    memory = StructureMemory(
        plan.model, plan.cluster.device, lambda htask: sample_works(htask, data, attention=attention).largest
    )
    return memory.stages(structure, plan.actions)
