"""The schedule that is best for a partition of the tasks into hTasks."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
from numpy.typing import NDArray

from muxtune.planning.decisions.partition_dp import Groups
from muxtune.planning.decisions.structure import HTaskChoice, PlanStructure
from muxtune.planning.exact.bounds import exact_bounds
from muxtune.planning.problem.assemble import structure_iteration_s
from muxtune.planning.problem.carrying import cut_choice, cut_variants
from muxtune.planning.problem.memory_limit import fits
from muxtune.planning.problem.schedules import pipeline_candidates
from muxtune.planning.problem.spreading import spread_choice, spread_variants
from muxtune.planning.refinement.groups import GroupTable
from muxtune.schedule import Template


@dataclass(frozen=True, slots=True)
class Appraised:
    """The fastest schedule of a partition that fits the memory."""

    groups: Groups
    seconds: float
    """Seconds of an iteration."""
    structure: PlanStructure


class Appraiser:
    """Finds the fastest schedule of a partition: over all groupings and templates, within the memory.

    Args:
        table: Groups of the problem's tasks.
        templates: Templates that may be used.
        seconds_of: Iteration time of a structure; the recurrence by default.
        cut: Whether long micro-batches may be cut, too; see :mod:`muxtune.planning.problem.carrying`.
        widely: Whether they are cut to the paces of single tasks, too, and spread
            (:mod:`muxtune.planning.problem.spreading`), so that nothing is left that a search may try.
    """

    def __init__(
        self,
        table: GroupTable,
        templates: Sequence[Template],
        seconds_of: Callable[[PlanStructure], float] | None = None,
        *,
        cut: bool = False,
        widely: bool = False,
    ) -> None:
        self.table = table
        self.templates = tuple(templates)
        self.appraisals = 0
        """Partitions whose schedules were played."""
        self.misfits = False
        """Whether a schedule that would be faster did not fit the memory."""
        self._seconds_of = seconds_of or partial(structure_iteration_s, table.problem)
        self.cut = cut and table.mesh.pp > 1
        self._widely = widely
        self._least_load_s = lru_cache(maxsize=None)(self._least_load)

    def bound_s(self, groups: Groups, templates: Sequence[Template] = ()) -> float:
        """What no schedule of the partition is faster than; see :mod:`muxtune.planning.refinement.groups`."""
        bound_s = self.table.bound_s(groups, templates or self.templates)
        if not self.cut:
            return bound_s
        return min(bound_s, float(np.sum([self._least_load_s(mask) for mask in groups], axis=0).max()))

    def surely_exceeds(self, groups: Groups) -> bool:
        """Whether some stage needs more than its memory under every schedule of the partition."""
        return not self.cut and self.table.surely_exceeds(groups)

    def _least_load(self, mask: int) -> NDArray[np.float64]:
        """Work of each stage, with micro-batches cut, spread or not."""
        group, table = self.table[mask], self.table
        loads_s = [group.terms.load_s[:, 0]]
        settings = table.problem.settings
        for carry in settings.carries[1:]:
            if group.choice.shape.tokens >= carry * settings.least_cut_tokens:
                choice = cut_choice(table.problem, table.mesh, table.members(mask), carry)
                times = table.problem.htask_times(choice, table.mesh)
                loads_s.append(choice.shape.microbatches * np.add(times.fwd_s, times.bwd_s))
        if self._widely:
            problem, mesh = table.problem, table.mesh
            longest = 1 << (group.choice.shape.tokens - 1).bit_length()
            for halved in range(1, settings.spreads + 1):
                choice = spread_choice(problem, group.choice, mesh.dp, longest >> halved)
                times = problem.htask_times(choice, mesh)
                loads_s.append(choice.shape.microbatches * np.add(times.fwd_s, times.bwd_s))
        return np.asarray(np.min(loads_s, axis=0))

    def structures(self, groups: Groups) -> list[PlanStructure]:
        """All schedules of a partition that are compared."""
        problem, mesh = self.table.problem, self.table.mesh
        htasks = self.table.htasks(groups)
        found = pipeline_candidates(problem, htasks, mesh, self.templates)
        for variant in self._variants(htasks):
            found += pipeline_candidates(problem, variant, mesh, self.templates)
        return found

    def _variants(self, htasks: tuple[HTaskChoice, ...]) -> list[tuple[HTaskChoice, ...]]:
        """The partition with long micro-batches cut or spread, without repetitions."""
        if not self.cut:
            return []
        problem, mesh = self.table.problem, self.table.mesh
        cut = list(cut_variants(problem, htasks, mesh))
        if not self._widely:
            return cut
        alone = [self.table[1 << task].slowest_s for task in range(len(self.table.task_ids))]
        cuts = problem.settings.cuts_of_tasks
        cut += cut_variants(problem, htasks, mesh, longest_s=max(alone), cuts=cuts)
        spread = [each for base in (htasks, *cut) for each in spread_variants(problem, base, mesh)]
        return list(dict.fromkeys([*cut, *spread]))

    def least_structures(self, partitions: Iterable[Groups]) -> list[PlanStructure]:
        """All schedules of those partitions that may need least memory, to refuse with."""
        return [
            structure
            for groups in least_memory(self.table, partitions)
            for structure in self.structures(groups)
        ]

    def appraise(self, groups: Groups, below_s: float = math.inf) -> Appraised | None:
        """The fastest schedule that fits, if one is faster than ``below_s``."""
        if self.bound_s(groups) >= below_s:
            return None
        problem, mesh = self.table.problem, self.table.mesh
        htasks = self.table.htasks(groups)
        timed: list[tuple[float, PlanStructure]] = []
        if self.table.surely_exceeds(groups):
            self.misfits = True
        else:
            bound_s = {template: self.table.bound_s(groups, [template]) for template in self.templates}
            timed += self._played(htasks, bound_s, below_s)
        for variant in self._variants(htasks):
            times = [problem.htask_times(htask, mesh) for htask in variant]
            run = max(htask.shape.carry for htask in variant)
            bounds = exact_bounds(times, [htask.shape.microbatches for htask in variant], run)
            bound_s = {template: bounds.of([template]) for template in self.templates}
            if min(bound_s.values()) < below_s:
                timed += self._played(variant, bound_s, below_s)
        self.appraisals += bool(timed)
        for seconds, structure in sorted(timed, key=lambda each: each[0]):
            if seconds >= below_s:
                break
            if fits(problem, structure):
                return Appraised(groups, seconds, structure)
            self.misfits = True
        return None

    def _played(
        self,
        htasks: Sequence[HTaskChoice],
        bound_s: Mapping[Template, float],
        below_s: float,
    ) -> Iterator[tuple[float, PlanStructure]]:
        """Schedules that may be faster than ``below_s``."""
        problem, mesh = self.table.problem, self.table.mesh
        templates = [template for template in self.templates if bound_s[template] < below_s]
        for structure in pipeline_candidates(problem, htasks, mesh, templates) if templates else ():
            yield self._seconds_of(structure), structure


def least_memory(table: GroupTable, partitions: Iterable[Groups]) -> list[Groups]:
    """The partitions that may need least memory: a few with the least bounds from above and from below."""
    known = list(partitions)
    bounds = (table.needed_bytes, table.least_bytes)
    least = [
        groups
        for bound in bounds
        for _, groups in heapq.nsmallest(
            table.problem.settings.least_memory, ((bound(groups), groups) for groups in known)
        )
    ]
    return list(dict.fromkeys(least))
