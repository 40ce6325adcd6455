"""mLoRA: one backbone, and a pipeline in which every batch of tasks has one micro-batch on the way.

mLoRA (Ye et al., VLDB'25, arXiv 2312.02515) has two parts. *BatchLoRA* puts tasks that share the backbone
into one batch, padded to its longest sequence. *LoRAPP* pipelines them: whoever has no micro-batch in the
pipeline injects the next one, so a task waits for its own backward and for nobody else's; backwards go first.
With as many batches as stages there is no bubble, and one micro-batch of a task at most is ever kept.

Who is batched with whom is left to the user there. Here tasks of near-equal length are, into every possible
number of batches, and the costs decide.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from muxtune.planning.decisions.options import PlanOptions
from muxtune.planning.decisions.structure import PlanStructure
from muxtune.planning.problem.every_mesh import on_every_mesh
from muxtune.planning.problem.problem import PlanningProblem
from muxtune.planning.problem.schedules import aligned_groups
from muxtune.policies.base import POLICIES
from muxtune.policies.shared import refuse_partition
from muxtune.support.errors import SpecError


@POLICIES.register("mlora")
class MLora:
    """Batches of tasks, padded to the longest declared length, with one micro-batch each in the pipeline."""

    summary = "mLoRA: padded batches of tasks on one backbone, each with one micro-batch in the pipeline"

    def propose(self, problem: PlanningProblem, options: PlanOptions) -> list[PlanStructure]:
        """Structures for every number of batches and every mesh, one per order of injection."""
        refuse_partition(options, "mlora")
        if (options.carry or 1) > 1 and options.template in {None, "lorapp"}:
            raise SpecError("--carry", options.carry, "nothing: an hTask has one micro-batch on its way")

        def build(fixed: PlanOptions) -> list[PlanStructure]:
            structures = []
            for groups in batches_by_length(problem):
                htasks, mesh = aligned_groups(problem, fixed.padded_by_default(), groups)
                count = len(groups)
                for bucket in dict.fromkeys((tuple(range(count)), tuple(reversed(range(count))))):
                    structures.append(
                        PlanStructure(
                            htasks=tuple(htasks),
                            buckets=(bucket,),
                            template=fixed.template or "lorapp",
                            mesh=mesh,
                        )
                    )
            return structures

        return on_every_mesh(problem, options, build)


def batches_by_length(problem: PlanningProblem) -> list[list[tuple[str, ...]]]:
    """Tasks in 1, 2, ... batches of near-equal size; neighbours in declared length share one."""
    ordered = [task.id for task in sorted(problem.tasks, key=lambda task: (task.max_length, task.id))]
    return [_cut(ordered, count) for count in range(1, len(ordered) + 1)]


def _cut(ordered: Sequence[str], count: int) -> list[tuple[str, ...]]:
    cuts = [round(i * len(ordered) / count) for i in range(count + 1)]
    return [tuple(ordered[start:stop]) for start, stop in pairwise(cuts)]
