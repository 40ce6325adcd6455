"""From a partition to complete structures: layers per stage, buckets and template."""

from __future__ import annotations

from collections.abc import Sequence

from muxtune.planning.decisions.options import PlanOptions
from muxtune.planning.decisions.structure import HTaskChoice, Mesh, PlanStructure
from muxtune.planning.problem.grouping import bucket_candidates
from muxtune.planning.problem.layouts import cheapest_alignment
from muxtune.planning.problem.problem import PlanningProblem
from muxtune.planning.problem.stages import choose_mesh
from muxtune.schedule.actions import Template


def aligned_groups(
    problem: PlanningProblem, options: PlanOptions, groups: Sequence[tuple[str, ...]]
) -> tuple[list[HTaskChoice], Mesh]:
    """Groups with their cheapest alignments, and the mesh with balanced layers per stage.

    Raises:
        SpecError: A sequence is longer than the chunk asked for, or there are fewer layers than stages.
    """
    dp = options.dp or 1
    packed = [HTaskChoice(task_ids=group, shape=problem.shape(group, "pack", dp=dp)) for group in groups]
    align = cheapest_alignment(problem, choose_mesh(problem, packed, options), options)
    htasks = [align(group) for group in groups]
    return htasks, choose_mesh(problem, htasks, options)


def pipeline_candidates(
    problem: PlanningProblem,
    htasks: Sequence[HTaskChoice],
    mesh: Mesh,
    templates: Sequence[Template],
) -> list[PlanStructure]:
    """All groupings and templates for a partition."""
    latencies = [problem.htask_times(htask, mesh).slowest_s for htask in htasks]
    return [
        PlanStructure(htasks=tuple(htasks), buckets=buckets, template=template, mesh=mesh)
        for buckets in bucket_candidates(latencies)
        for template in templates
    ]


def in_order(htasks: Sequence[HTaskChoice], mesh: Mesh, template: Template) -> PlanStructure:
    """A structure without grouping: one bucket per hTask, in the order given."""
    buckets = tuple((h,) for h in range(len(htasks)))
    return PlanStructure(htasks=tuple(htasks), buckets=buckets, template=template, mesh=mesh)
