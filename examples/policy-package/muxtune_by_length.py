"""A policy of one's own: tasks that declare the same length share an hTask, so nobody pads for others."""

from __future__ import annotations

from collections import defaultdict

from muxtune.planning.decisions.options import PlanOptions
from muxtune.planning.decisions.structure import PlanStructure
from muxtune.planning.problem.problem import PlanningProblem
from muxtune.policies import fixed_partition, refuse_partition


class ByLength:
    """One hTask per declared length; mesh, alignment, buckets and template are left to the costs."""

    summary = "an hTask per declared length, on one backbone"

    def propose(self, problem: PlanningProblem, options: PlanOptions) -> list[PlanStructure]:
        """What is worth pricing for this fusion; muxtune prices it and keeps the fastest.

        Args:
            problem: Tasks with their data, backbone, cluster and costs.
            options: What the user has fixed.

        Returns:
            Structures that fit the memory.

        Raises:
            SpecError: The user has fixed the fusion, or nothing fits the memory.
        """
        refuse_partition(options, "by-length")
        groups: defaultdict[int, list[str]] = defaultdict(list)
        for task in problem.tasks:
            groups[task.max_length].append(task.id)
        return fixed_partition(problem, options, [tuple(groups[length]) for length in sorted(groups)])
