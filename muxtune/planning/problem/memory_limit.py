"""The memory's limit: which structures fit, and what to say if none does."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NoReturn

from muxtune.batches import Alignment
from muxtune.memory import StageMemory
from muxtune.planning.decisions.structure import HTaskChoice, PlanStructure
from muxtune.planning.problem.assemble import structure_schedule
from muxtune.planning.problem.problem import PlanningProblem
from muxtune.support.errors import NotEnoughMemoryError
from muxtune.support.tables import Quantity, show_bytes, show_bytes_down, show_bytes_up
from muxtune.tasks import Workload

Variant = tuple[str, PlanningProblem, PlanStructure]
"""What is changed, in words, and the problem and structure with the change."""


def fits(problem: PlanningProblem, structure: PlanStructure) -> bool:
    """Whether a structure fits; see :meth:`MemoryLimit.fits`."""
    return MemoryLimit(problem).fits(structure)


def fitting(problem: PlanningProblem, structures: Sequence[PlanStructure]) -> list[PlanStructure]:
    """The structures whose stages all stay inside their device's memory.

    Raises:
        SpecError: None does; has the bytes of the one that needs least, and the nearest change that fits.
    """
    limit = MemoryLimit(problem)
    fit = limit.fitting(structures)
    if not fit:
        limit.refuse()
    return fit


class MemoryLimit:
    """Says whether structures fit, and what is missing if none does.

    Args:
        problem: Has the memory.
    """

    def __init__(self, problem: PlanningProblem) -> None:
        self._problem = problem
        self._least: tuple[float, PlanStructure | None] = (math.inf, None)
        """Bytes and structure of the one that needs least, among those that do not fit."""

        self._known: dict[PlanStructure, bool] = {}

    def fits(self, structure: PlanStructure) -> bool:
        """Whether every stage stays inside its device's memory, by its schedule if no bound says so."""
        if structure not in self._known:
            limit = self._problem.cluster.device.memory_bytes
            self._known[structure] = self._surely_fits(structure) or (
                _fullest(self._problem, structure, give_up_bytes=limit)[1].total_bytes <= limit
            )
        return self._known[structure]

    def _surely_fits(self, structure: PlanStructure) -> bool:
        """Whether a bound that needs no schedule says that it fits."""
        limit = self._problem.cluster.device.memory_bytes
        return all(stage.total_bytes <= limit for stage in self._problem.memory(structure))

    def fitting(self, structures: Sequence[PlanStructure]) -> list[PlanStructure]:
        """Structures whose stages all stay inside their device's memory."""
        problem = self._problem
        limit = problem.cluster.device.memory_bytes
        fit: set[PlanStructure] = set()
        drained: dict[PlanStructure, bool] = {}  # under flush, whether it fits
        for structure in sorted(structures, key=lambda s: s.template != "flush"):
            flush = replace(structure, template="flush")
            if structure.template == "continuous" and not drained.get(flush, True):
                continue  # it begins alike, and where the other drains, it has more micro-batches open
            fits = self._surely_fits(structure)
            if not fits:
                # What needs more than another that does not fit is of no interest to anybody.
                needed = _fullest(problem, structure, give_up_bytes=max(self._least[0], limit))[1].total_bytes
                fits = needed <= limit
                if not fits and needed < self._least[0]:
                    self._least = needed, structure
            if fits:
                fit.add(structure)
            if structure.template == "flush":
                drained[structure] = fits
        return [structure for structure in structures if structure in fit]

    def refuse(self) -> NoReturn:
        """Say what is missing.

        Raises:
            SpecError: Has the bytes of the one that needs least, and the nearest change that fits.
        """
        assert self._least[1] is not None, "nobody asks about no structures"
        raise _refusal(self._problem, self._least[1])


def _refusal(problem: PlanningProblem, structure: PlanStructure) -> NotEnoughMemoryError:
    stage, memory = _fullest(problem, structure)
    field = f"cluster.device.memory_bytes of {problem.cluster.name}"
    has = Quantity(show_bytes_down(problem.cluster.device.memory_bytes))
    needed_bytes = memory.total_bytes
    needs = f"at least {show_bytes_up(needed_bytes)}: stage {stage} needs {_parts(memory)}"
    advice, nearest_bytes = _advice(problem, structure)
    return NotEnoughMemoryError(field, has, f"{needs}; {advice}", needed_bytes, nearest_bytes)


def _fullest(
    problem: PlanningProblem, structure: PlanStructure, *, give_up_bytes: float = math.inf
) -> tuple[int, StageMemory]:
    """The stage that needs most, and what it needs."""
    return problem.fullest_stage(structure, structure_schedule(structure), give_up_bytes=give_up_bytes)


def _parts(memory: StageMemory) -> str:
    parts = {
        "the backbone": memory.backbone_bytes + memory.table_bytes,
        "adapters": memory.adapter_bytes + memory.optimizer_bytes + memory.gradient_bytes,
        "activations": memory.activation_bytes + memory.logit_bytes + memory.chunk_kv_bytes,
        "messages and temporaries": memory.message_bytes + memory.workspace_bytes + memory.allocator_bytes,
    }
    first, *others, last = [f"{show_bytes(size)} for {name}" for name, size in parts.items()]
    return f"{', '.join([first, *others])} and {last}"


def _advice(problem: PlanningProblem, structure: PlanStructure) -> tuple[str, int]:
    """What could be changed, and the memory that it needs then."""
    limit = problem.cluster.device.memory_bytes
    least = ("", _fullest(problem, structure)[1].total_bytes)
    for change, changed_problem, changed in _variants(problem, structure):
        needed = _fullest(changed_problem, changed)[1].total_bytes
        if needed <= limit:
            return f"the nearest that fits needs {show_bytes_up(needed)}: {change}", needed
        if needed < least[1]:
            least = (change, needed)
    if not least[0]:
        return "other partitions and smaller micro-batches need no less", least[1]
    return f"nothing near fits; least is {show_bytes_up(least[1])}: {least[0]}", least[1]


def _variants(problem: PlanningProblem, structure: PlanStructure) -> Iterator[Variant]:
    """Changes that save memory, the gentlest first."""
    htasks, dp = structure.htasks, structure.mesh.dp
    changes: list[str] = []
    if len({htask.instance for htask in htasks}) > 1:
        htasks = tuple(replace(htask, instance=0) for htask in htasks)
        changes.append("one backbone for all (policy temporal-only)")
        yield changes[-1], problem, _with_htasks(structure, htasks)
    if any(htask.shape.alignment == "pad" for htask in htasks):
        htasks = tuple(_aligned(problem, htask.task_ids, "pack", dp=dp) for htask in htasks)
        changes.append("packed sequences (--alignment pack)")
        yield ", ".join(changes), problem, _with_htasks(structure, htasks)
    if any(len(htask.task_ids) > 1 for htask in htasks):
        htasks = tuple(
            _aligned(problem, (task_id,), htask.shape.alignment, htask.shape.row_tokens, dp=dp)
            for htask in htasks
            for task_id in htask.task_ids
        )
        changes.append("every task in an hTask of its own (policy temporal-only)")
        yield ", ".join(changes), problem, _with_htasks(structure, htasks)
    if structure.pp > 1 and structure.template != "lorapp":
        yield from _carried(problem, structure, htasks, changes)
    cap = max(task.micro_batch_size for task in problem.tasks) // 2
    while cap:
        smaller = _with_micro_batches(problem, cap)
        reshaped = tuple(
            replace(
                _aligned(smaller, htask.task_ids, htask.shape.alignment, htask.shape.row_tokens, dp=dp),
                instance=htask.instance,
            )
            for htask in htasks
        )
        change = f"micro_batch_size of at most {cap}"
        yield ", ".join([*changes, change]), smaller, _with_htasks(structure, reshaped)
        cap //= 2


def _carried(
    problem: PlanningProblem,
    structure: PlanStructure,
    htasks: Sequence[HTaskChoice],
    changes: Sequence[str],
) -> Iterator[Variant]:
    """Micro-batches cut over carry groups."""
    chunk_tokens = problem.settings.carried_chunks[0]
    for carry in problem.settings.carries[1:]:
        cut = tuple(
            replace(
                htask,
                shape=problem.shape(htask.task_ids, "chunk", chunk_tokens, carry, dp=structure.mesh.dp),
            )
            for htask in htasks
        )
        options = f"--chunk-tokens {chunk_tokens} --carry {carry}"
        change = f"chunks over {carry} micro-batches ({options})"
        yield ", ".join([*changes, change]), problem, _with_htasks(structure, cut)


def _aligned(
    problem: PlanningProblem,
    task_ids: tuple[str, ...],
    alignment: Alignment,
    row_tokens: int | None = None,
    *,
    dp: int,
) -> HTaskChoice:
    chunk_tokens = row_tokens if alignment == "chunk" else None
    return HTaskChoice(task_ids=task_ids, shape=problem.shape(task_ids, alignment, chunk_tokens, dp=dp))


def _with_htasks(structure: PlanStructure, htasks: tuple[HTaskChoice, ...]) -> PlanStructure:
    buckets = structure.buckets
    if len(htasks) != len(structure.htasks):
        buckets = tuple((h,) for h in range(len(htasks)))
    # An own order belongs to the hTasks that it was made for.
    return replace(structure, htasks=htasks, buckets=buckets, injection=(), in_flight=())


def _with_micro_batches(problem: PlanningProblem, cap: int) -> PlanningProblem:
    """This problem with micro-batches of at most ``cap`` sequences."""
    tasks = tuple(
        task.model_copy(
            update={
                "micro_batch_size": max(
                    size
                    for size in range(1, min(cap, task.micro_batch_size) + 1)
                    if task.global_batch_size % size == 0
                )
            }
        )
        for task in problem.tasks
    )
    workload = Workload(tasks=tasks)
    return PlanningProblem(workload, problem.model, problem.cluster, problem.costs, settings=problem.settings)
