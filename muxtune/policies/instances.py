"""One instance per task: what a provider does without multiplexing."""

from __future__ import annotations

from dataclasses import replace

from muxtune.errors import SpecError
from muxtune.planning.limits import fitting
from muxtune.planning.options import PlanOptions
from muxtune.planning.pipeline import aligned_groups, in_order
from muxtune.planning.problem import PlanningProblem
from muxtune.planning.structure import PlanStructure
from muxtune.policies.base import POLICIES


@POLICIES.register("nemo")
class Nemo:
    """Every task is an instance of its own with its own copy of the backbone; the instances take turns.

    An instance runs 1F1B over its own micro-batches and drains before the next one starts. Sequences are
    padded to the task's declared length. Kernels, balanced layers and the loss on target tokens only are
    those of every other policy.
    """

    summary = "one instance per task with its own backbone, padded, 1F1B with a flush"

    def propose(self, problem: PlanningProblem, options: PlanOptions) -> list[PlanStructure]:
        """One structure: the tasks one after the other."""
        if options.partition is not None:
            raise SpecError("--partition", options.partition, "nothing: nemo never fuses tasks")
        groups = [(task.id,) for task in problem.tasks]
        aligned, mesh = aligned_groups(problem, options.padded_by_default(), groups)
        htasks = [replace(htask, instance=number) for number, htask in enumerate(aligned)]
        return fitting(problem, [in_order(htasks, mesh, options.template or "flush")])
