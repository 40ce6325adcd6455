"""A planning problem: tasks with their data, backbone, cluster and costs, and the price of any decision."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache, partial

import numpy as np
from numpy.typing import NDArray

from muxtune.batches import (
    Alignment,
    AlignmentReport,
    HTaskShape,
    alignment_report,
    effective_tokens,
    htask_microbatches,
    phase_tokens,
    phases,
    row_tokens_of,
    step_group_tokens,
)
from muxtune.cluster import ClusterSpec
from muxtune.costs.base import CostModel
from muxtune.costs.needs import needed_kinds
from muxtune.memory import StageMemory
from muxtune.model import ModelSpec
from muxtune.peft import PeftSpec
from muxtune.plan import ClockLaunches, IterationTokens
from muxtune.planning.decisions.options import PlanOptions
from muxtune.planning.decisions.settings import DEFAULT_SETTINGS, SearchSettings
from muxtune.planning.decisions.structure import PlanStructure
from muxtune.planning.exact.bytes import StructureMemory
from muxtune.planning.exact.seconds import StructurePrices, overlaps
from muxtune.planning.exact.works import sample_works
from muxtune.schedule import Action, StageTimes
from muxtune.tasks import PeftTask, TaskData, Workload, load_task_data, load_tokenizer


class PlanningProblem:
    """Tasks, backbone, cluster and costs.

    Args:
        workload: Workload with the tasks.
        model: Backbone; its dtype is the one that is planned.
        cluster: Where the plan will run.
        costs: Prices of operators there.
        progress: Told by long searches how many steps are done, and of how many.
        settings: How far searches look.

    Raises:
        UserError: A task does not fit the backbone, or its dataset cannot be read.
    """

    def __init__(
        self,
        workload: Workload,
        model: ModelSpec,
        cluster: ClusterSpec,
        costs: CostModel,
        *,
        progress: Callable[[int, int], None] | None = None,
        settings: SearchSettings = DEFAULT_SETTINGS,
    ) -> None:
        workload.check(model)
        self.model = model
        self.cluster = cluster
        costs = costs.of_kinds(needed_kinds((task.peft for task in workload.tasks), model))
        self.costs = costs
        self.progress = progress
        self.settings = settings
        self.searches: dict[PlanOptions, object] = {}
        """Records of searches for some options, for whoever asks why a plan won."""
        tokenizer = None
        if any(task.dataset.path is not None for task in workload.tasks):
            tokenizer = load_tokenizer(model)
        same: dict[PeftSpec, PeftSpec] = {}  # equal methods are one object, which is quicker to look up
        tasks = [
            task.model_copy(update={"peft": same.setdefault(task.peft, task.peft)}) for task in workload.tasks
        ]
        self.data: dict[str, TaskData] = {task.id: load_task_data(task, model, tokenizer) for task in tasks}
        self._pefts = tuple(task.peft for task in tasks)
        # Shapes and prices are asked for again and again by every policy; both depend on the arguments alone.
        self._shape = lru_cache(maxsize=None)(self._measure_shape)
        self.group_tokens = lru_cache(maxsize=None)(self._measure_groups)
        works = partial(sample_works, data=self.data, attention=costs.attention)
        self._works = lru_cache(maxsize=None)(works)
        self._prices = StructurePrices(costs, model, cluster, self._pefts, self._works)
        self.stage_kinds = self._prices.stage_kinds
        self.slowest_work = self._prices.work
        self.htask_times = self._prices.htask_times
        self.layer_seconds = self._prices.layer_seconds
        self.end_seconds = self._prices.end_seconds
        self.step_seconds = self._prices.step_seconds
        self._memory = StructureMemory(
            model, cluster.device, self._pefts, lambda htask: self._works(htask).fullest
        )

    @property
    def tasks(self) -> list[PeftTask]:
        """Tasks in the order of the workload."""
        return [data.task for data in self.data.values()]

    def longest_sequence(self, task_ids: Sequence[str]) -> int:
        """Longest sequence of these tasks in tokens, after truncation."""
        return max(self.data[task_id].longest for task_id in task_ids)

    def shape(
        self,
        task_ids: Sequence[str],
        alignment: Alignment,
        chunk_tokens: int | None = None,
        carry: int = 1,
        *,
        dp: int = 1,
        microbatches: int | None = None,
    ) -> HTaskShape:
        """Smallest static shape of these tasks' fused micro-batches on ``dp`` replicas.

        A carry group has the sequences of a declared micro-batch, cut over its ``carry`` micro-batches.
        There are as few micro-batches as the tasks' sizes allow, or ``microbatches`` of them.
        """
        return self._shape(tuple(task_ids), alignment, chunk_tokens, carry, dp, microbatches)

    def times(self, structure: PlanStructure) -> StageTimes:
        """Durations that the structure's schedule is played with."""
        return self._prices.stage_times(structure)

    def launches(self, structure: PlanStructure) -> tuple[ClockLaunches, ...]:
        """Launch orders of the structure's clocks, as far as they overlap."""
        return self._prices.launches(structure)

    def price_again(self, structure: PlanStructure) -> None:
        """Ask the costs anew for what the structure needs, so that they say what they did not measure."""
        StructurePrices(self.costs, self.model, self.cluster, self._pefts, self._works).stage_times(structure)

    def cost_notes(self, structure: PlanStructure) -> tuple[str, ...]:
        """What is doubtful about the costs of a structure, whatever was priced before."""
        with self.costs.exploring(), self.costs.noting() as notes:
            self.price_again(structure)
        if overlaps(structure.mesh, structure.orchestration) and self.costs.contention is None:
            notes.append(
                "computing beside a collective is taken to slow neither: nobody measured it on this device"
            )
        return tuple(notes)

    def memory(
        self, structure: PlanStructure, actions: Sequence[Sequence[Action]] | None = None
    ) -> tuple[StageMemory, ...]:
        """Bytes that each stage needs at its peak; see :meth:`StructureMemory.stages`."""
        return self._memory.stages(structure, actions)

    def fullest_stage(
        self,
        structure: PlanStructure,
        actions: Sequence[Sequence[Action]],
        *,
        give_up_bytes: float = math.inf,
    ) -> tuple[int, StageMemory]:
        """The stage that needs most, and what it needs; see :meth:`StructureMemory.fullest`."""
        return self._memory.fullest(structure, actions, give_up_bytes=give_up_bytes)

    def iteration_tokens(self, structure: PlanStructure) -> IterationTokens:
        """Tokens of one iteration; the effective ones are the mean over the steps."""
        return IterationTokens(
            all=sum(
                htask.shape.step_tokens(
                    self.data[task_id].task.global_batch_size for task_id in htask.task_ids
                )
                for htask in structure.htasks
            ),
            billed=sum(task.global_batch_size * task.max_length for task in self.tasks),
            effective=self._effective_tokens,
        )

    def alignment_report(self, structure: PlanStructure) -> AlignmentReport:
        """Tokens of one iteration, and what other alignments of the same hTasks would need."""
        return alignment_report(
            self.data,
            [(htask.task_ids, htask.shape) for htask in structure.htasks],
            measure=self._stream_tokens,
        )

    def _stream_tokens(
        self, task_ids: tuple[str, ...], alignment: Alignment, chunk_tokens: int | None, groups: int
    ) -> int:
        return self._measure_tokens(task_ids, alignment, chunk_tokens, groups, 1)[1]

    @cached_property
    def _effective_tokens(self) -> float:
        return effective_tokens(self.data.values())

    def _measure_shape(
        self,
        task_ids: tuple[str, ...],
        alignment: Alignment,
        chunk_tokens: int | None,
        carry: int,
        dp: int,
        microbatches: int | None,
    ) -> HTaskShape:
        turns = -(-htask_microbatches([self.data[task_id] for task_id in task_ids]) // dp)
        if microbatches is not None:
            turns = microbatches // carry
        row_tokens, tokens = self._measure_tokens(task_ids, alignment, chunk_tokens, turns * dp, carry)
        return HTaskShape(
            alignment=alignment,
            row_tokens=row_tokens,
            microbatches=turns * carry,
            replicas=dp,
            tokens=tokens,
            carry=carry,
        )

    def _measure_tokens(
        self,
        task_ids: tuple[str, ...],
        alignment: Alignment,
        chunk_tokens: int | None,
        groups: int,
        carry: int,
    ) -> tuple[int | None, int]:
        """Row length and length of the stream; ``groups`` are carry groups."""
        members = [self.data[task_id] for task_id in task_ids]
        row_tokens = row_tokens_of(members, alignment, chunk_tokens)
        sizes = [self.group_tokens(task_id, alignment, groups, row_tokens) for task_id in task_ids]
        first = phases(members)[0]
        return row_tokens, phase_tokens(members, sizes, alignment, first, row_tokens=row_tokens, carry=carry)

    def _measure_groups(
        self, task_id: str, alignment: Alignment, microbatches: int, row_tokens: int | None
    ) -> NDArray[np.int64]:
        return step_group_tokens(self.data[task_id], alignment, microbatches, row_tokens)
