"""One instance per task: what a provider does without multiplexing."""

from __future__ import annotations

from dataclasses import replace

from muxtune.planning.decisions.options import PlanOptions
from muxtune.planning.decisions.structure import HTaskChoice, Mesh, PlanStructure
from muxtune.planning.problem.every_mesh import on_every_mesh
from muxtune.planning.problem.problem import PlanningProblem
from muxtune.planning.problem.schedules import aligned_groups, in_order
from muxtune.policies.base import POLICIES
from muxtune.policies.shared import refuse_partition


@POLICIES.register("nemo")
class Nemo:
    """Every task is an instance of its own with its own copy of the backbone; the instances take turns.

    An instance runs 1F1B over its own micro-batches and drains before the next one starts. Sequences are
    padded to the task's declared length. Kernels, balanced layers and the loss on target tokens only are
    those of every other policy.
    """

    summary = "one instance per task with its own backbone, padded, 1F1B with a flush"

    def propose(self, problem: PlanningProblem, options: PlanOptions) -> list[PlanStructure]:
        """One structure per mesh: the tasks one after the other."""
        refuse_partition(options, "nemo")

        def build(fixed: PlanOptions) -> list[PlanStructure]:
            htasks, mesh = task_instances(problem, fixed)
            return [in_order(htasks, mesh, fixed.template or "flush")]

        return on_every_mesh(problem, options, build)


def task_instances(problem: PlanningProblem, options: PlanOptions) -> tuple[list[HTaskChoice], Mesh]:
    """Every task as an hTask on a backbone of its own, padded unless the options ask for something else."""
    groups = [(task.id,) for task in problem.tasks]
    htasks, mesh = aligned_groups(problem, options.padded_by_default(), groups)
    return [replace(htask, instance=number) for number, htask in enumerate(htasks)], mesh
