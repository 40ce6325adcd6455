"""What groups of tasks cost as hTasks, and what no partition into such groups can go below.

A search over partitions asks for the same groups again and again, so each is aligned, priced and weighed
once. A group is a bit mask over the tasks in the order of
:func:`muxtune.planning.problem.layouts.sort_by_tokens`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from muxtune.memory import StageMemory
from muxtune.planning.decisions.partition_dp import Groups, set_partitions
from muxtune.planning.decisions.structure import HTaskChoice, Mesh
from muxtune.planning.exact.bounds import BoundTerms, exact_terms
from muxtune.planning.problem.layouts import sort_by_tokens
from muxtune.planning.problem.problem import PlanningProblem
from muxtune.planning.problem.schedules import in_order
from muxtune.schedule import Action, Template

# S pipeline stages


@dataclass(frozen=True, slots=True)
class Group:
    """One group of tasks as an hTask."""

    choice: HTaskChoice
    slowest_s: float
    """Seconds of one micro-batch on the slowest stage."""
    terms: BoundTerms
    """What it adds to the bounds, ``[S, 1]``."""
    kept_bytes: tuple[int, ...]
    """``[S]``, by each open micro-batch for its backward; of a carry group, by the one that keeps least."""
    forward_bytes: tuple[int, ...]
    """``[S]``, temporaries of a forward; of a carry group, those of the micro-batch that has least."""
    least_bytes: tuple[int, ...]
    """``[S]``, while one of its micro-batches, or carry groups, is there alone: no schedule needs less."""

    @property
    def microbatches(self) -> int:
        """Micro-batches per iteration."""
        return self.choice.shape.microbatches

    @property
    def cost_s(self) -> float:
        """Seconds of an iteration on the slowest stage: what the dynamic programming adds up."""
        return self.microbatches * self.slowest_s


class GroupTable:
    """All groups of a problem's tasks, each worked out when it is first asked for.

    Args:
        problem: The planning problem.
        mesh: The mesh.
        align: Chooses the alignment of a group; the carry groups of all are alike.
        one_method: Whether only tasks of one PEFT method may share a group.
    """

    def __init__(
        self,
        problem: PlanningProblem,
        mesh: Mesh,
        align: Callable[[tuple[str, ...]], HTaskChoice],
        *,
        one_method: bool = False,
    ) -> None:
        self.problem = problem
        self.mesh = mesh
        self.task_ids = tuple(sort_by_tokens(problem))
        self.methods = [
            problem.data[task_id].task.peft.method if one_method else "" for task_id in self.task_ids
        ]
        """What tasks must have in common to share a group."""
        self._align = align
        self._groups: dict[int, Group] = {}
        self._worked_out = self._groups
        """Groups of this table and of those that share its work."""
        self._static = _static_memory(problem, mesh)
        self._weigh = lru_cache(maxsize=None)(self._measure_bytes)

    def blank(self) -> GroupTable:
        """A table that shares the work of this one, but says of no group that it has been worked out.

        Who looks at :meth:`masks` then sees its own groups, whatever others have asked this table for.
        """
        blank = copy.copy(self)
        blank._groups = {}
        return blank

    def masks(self) -> list[int]:
        """Masks of the groups worked out so far."""
        return list(self._groups)

    def __contains__(self, mask: int) -> bool:
        """Whether a group has been worked out."""
        return mask in self._groups

    def __getitem__(self, mask: int) -> Group:
        """The group of the tasks whose bits are set."""
        group = self._groups.get(mask)
        if group is None:
            group = self._worked_out.get(mask) or self._work_out(mask)
            self._groups[mask] = self._worked_out[mask] = group
        return group

    def members(self, mask: int) -> tuple[str, ...]:
        """Task ids of a group."""
        return tuple(task_id for bit, task_id in enumerate(self.task_ids) if mask >> bit & 1)

    def may_share(self, mask: int) -> bool:
        """Whether these tasks may share an hTask."""
        return len({method for bit, method in enumerate(self.methods) if mask >> bit & 1}) == 1

    def partitions(self) -> Iterator[Groups]:
        """All partitions whose groups may be; of few tasks, for there are as many as Bell's number."""
        count = len(self.task_ids)
        shared = {mask for mask in range(1, 1 << count) if self.may_share(mask)}
        return (groups for groups in set_partitions(count) if shared.issuperset(groups))

    def mask(self, task_ids: Iterable[str]) -> int:
        """Inverse of :meth:`members`."""
        return sum(1 << self.task_ids.index(task_id) for task_id in task_ids)

    def htasks(self, partition: Groups) -> tuple[HTaskChoice, ...]:
        """The hTasks of a partition."""
        return tuple(self[mask].choice for mask in partition)

    def bound_s(self, partition: Groups, templates: Sequence[Template]) -> float:
        """What no schedule of the partition under any of these templates is faster than."""
        groups = [self[mask] for mask in partition]
        run = max(group.choice.shape.carry for group in groups)
        return BoundTerms.joined([group.terms for group in groups]).together(run).of(templates)

    def least_bytes(self, partition: Groups) -> int:
        """What no schedule of the partition needs less than, on the fullest stage.

        Stage ``s`` of a 1F1B schedule fills up to ``pp - s`` open micro-batches in its first iteration, any
        that stand next to each other in the order of injection: the largest with the smallest at least.
        """
        groups = [self[mask] for mask in partition]
        pp = self.mesh.pp
        least = max(max(group.least_bytes) for group in groups)
        for stage, static in enumerate(self._static):
            kept = sorted(
                group.kept_bytes[stage] for group in groups for _ in range(min(group.microbatches, pp))
            )
            least = max(least, static.bytes_with(kept[-1] + sum(kept[:-1][: pp - stage - 1])))
        return least

    def surely_exceeds(self, partition: Groups) -> bool:
        """Whether some stage needs more than its memory under every schedule of the partition."""
        return self.least_bytes(partition) > self.problem.cluster.device.memory_bytes

    def needed_bytes(self, partition: Groups) -> int:
        """What suffices on the fullest stage for any schedule of the partition."""
        structure = in_order(self.htasks(partition), self.mesh, "continuous")
        return max(stage.total_bytes for stage in self.problem.memory(structure))

    def exceeds_alone(self, mask: int) -> bool:
        """Whether a group needs more than the memory of some stage, whatever it is scheduled with."""
        limit = self.problem.cluster.device.memory_bytes
        return max(self[mask].least_bytes) > limit

    def _work_out(self, mask: int) -> Group:
        choice = self._align(self.members(mask))
        times = self.problem.htask_times(choice, self.mesh)
        weight = self._weigh(choice)
        return Group(
            choice=choice,
            slowest_s=times.slowest_s,
            terms=exact_terms([times], [choice.shape.microbatches]),
            kept_bytes=tuple(weight.kept.min(axis=0).tolist()),
            forward_bytes=tuple(weight.forward.min(axis=0).tolist()),
            least_bytes=weight.least,
        )

    def _measure_bytes(self, choice: HTaskChoice) -> _GroupBytes:
        alone = in_order([choice], self.mesh, "continuous")
        numbers = range(choice.shape.carry)
        opened = [self.problem.memory(alone, [[Action("F", 0, n)]] * self.mesh.pp) for n in numbers]
        backwards = [Action("B", 0, n) for n in reversed(numbers)]
        step = [*(Action("F", 0, n) for n in numbers), *backwards, Action("STEP", 0, 0)]
        peak = self.problem.memory(alone, [step] * self.mesh.pp)
        return _GroupBytes(
            kept=np.array([[_kept(stage) for stage in stages] for stages in opened]),
            forward=np.array([[stage.workspace_bytes for stage in stages] for stages in opened]),
            least=tuple(
                static.bytes_with(_comes_and_goes(stage))
                for static, stage in zip(self._static, peak, strict=True)
            ),
        )


class _GroupBytes(NamedTuple):
    """What a group needs by itself."""

    kept: NDArray[np.int64]
    """``[carry, S]``, of each micro-batch of a carry group for its backward."""
    forward: NDArray[np.int64]
    """``[carry, S]``, temporaries of its forward."""
    least: tuple[int, ...]
    """``[S]``, while one of its carry groups is there alone."""


@dataclass(frozen=True, slots=True)
class _StaticMemory:
    """What a stage always holds, whatever the partition: backbone, all adapters and optimizer states."""

    bytes: int
    allocator_fraction: float

    def bytes_with(self, more: int) -> int:
        """Total with ``more`` bytes, the allocator's share included (rounded down, to stay a bound)."""
        return int((self.bytes + more) * (1 + self.allocator_fraction))


def _static_memory(problem: PlanningProblem, mesh: Mesh) -> tuple[_StaticMemory, ...]:
    alone = [
        HTaskChoice(task_ids=(task_id,), shape=problem.shape((task_id,), "pack", dp=mesh.dp))
        for task_id in problem.data
    ]
    return tuple(
        _StaticMemory(
            stage.backbone_bytes + stage.table_bytes + stage.adapter_bytes + stage.optimizer_bytes,
            stage.allocator_bytes / (stage.total_bytes - stage.allocator_bytes),
        )
        for stage in problem.memory(in_order(alone, mesh, "continuous"))
    )


def _kept(stage: StageMemory) -> int:
    return stage.activation_bytes + stage.logit_bytes + stage.chunk_kv_bytes


def _comes_and_goes(stage: StageMemory) -> int:
    """Bytes of one hTask that do not depend on its neighbours; messages do."""
    return (
        stage.gradient_bytes
        + stage.activation_bytes
        + stage.logit_bytes
        + stage.chunk_kv_bytes
        + stage.workspace_bytes
    )
