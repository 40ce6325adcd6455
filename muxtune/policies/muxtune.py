"""The policy of the paper: fusion by dynamic programming, grouping, templates, alignment by cost."""

from __future__ import annotations

from muxtune.planning.fusion import cheapest_alignment, partitions_by_count
from muxtune.planning.limits import fitting, surely_fits
from muxtune.planning.options import PlanOptions, parse_partition
from muxtune.planning.pipeline import in_order, pipeline_candidates
from muxtune.planning.problem import PlanningProblem
from muxtune.planning.stages import choose_mesh
from muxtune.planning.structure import HTaskChoice, PlanStructure
from muxtune.policies.base import POLICIES
from muxtune.policies.shared import fixed_partition


@POLICIES.register("muxtune")
class MuxTune:
    """Spatial fusion where operators profit, temporal interleaving where the pipeline does."""

    summary = "fused and interleaved hTasks on one backbone, alignment and template by cost"

    def propose(self, problem: PlanningProblem, options: PlanOptions) -> list[PlanStructure]:
        """Best partition for every number of hTasks, with all groupings and templates."""
        if options.partition is not None:
            groups = parse_partition(options.partition, problem.data)
            return fixed_partition(problem, options, groups)
        alone = [
            HTaskChoice(task_ids=(task_id,), shape=problem.shape((task_id,), "pack", dp=options.dp or 1))
            for task_id in problem.data
        ]
        mesh = choose_mesh(problem, alone, options)
        align = cheapest_alignment(
            problem, mesh, alignment=options.alignment, chunk_tokens=options.chunk_tokens
        )

        def feasible(choice: HTaskChoice) -> bool:
            others = [c for c in alone if c.task_ids[0] not in choice.task_ids]
            return surely_fits(problem, in_order([choice, *others], mesh, "continuous"))

        templates = options.templates(("continuous", "flush"))
        partitions = partitions_by_count(problem, mesh, align, feasible)
        # The bound may rule out what a schedule has room for; every task by itself needs least.
        partitions = partitions or [tuple(align(c.task_ids) for c in alone)]
        return fitting(
            problem,
            [
                structure
                for partition in partitions
                for structure in pipeline_candidates(problem, partition, mesh, templates)
            ],
        )
