"""The best fusion there is, for a few tasks: what other policies are measured against."""

from __future__ import annotations

import math
from dataclasses import replace

from muxtune.errors import SpecError
from muxtune.planning.limits import fitting
from muxtune.planning.meshes import candidate_meshes
from muxtune.planning.options import PlanOptions
from muxtune.planning.partitions import (
    Appraised,
    best_of_all,
    set_partitions,
    task_appraiser,
)
from muxtune.planning.problem import PlanningProblem
from muxtune.planning.structure import PlanStructure
from muxtune.policies.base import POLICIES

MOST_TASKS = 9
"""21147 partitions; 10 tasks would have 115975."""

FINALISTS = 4
"""Partitions that are handed on."""


@POLICIES.register("exhaustive")
class Exhaustive:
    """Every set partition of the tasks on every mesh, with layers per stage balanced for the tasks alone.

    The optimum is over meshes, partitions, groupings and templates, with the cheapest alignment of every
    group, by the recurrence and within the memory. Only what a bound proves to be no better is left out.
    """

    summary = f"the best of all partitions, of at most {MOST_TASKS} tasks; more are refused"

    def propose(self, problem: PlanningProblem, options: PlanOptions) -> list[PlanStructure]:
        """The fastest schedules of the best partitions.

        Raises:
            SpecError: Too many tasks, a partition that is fixed, or nothing fits the memory.
        """
        if options.partition is not None:
            expected = "nothing: exhaustive tries all partitions; muxtune takes one that is fixed"
            raise SpecError("--partition", options.partition, expected)
        count = len(problem.data)
        if count > MOST_TASKS:
            expected = f"at most {MOST_TASKS} for the policy exhaustive, whose partitions it tries one by one"
            raise SpecError("number of tasks", count, expected)
        appraisers = [
            task_appraiser(problem, replace(options, **shape._asdict()))
            for shape in candidate_meshes(problem.model, problem.cluster, options)
        ]
        best: list[Appraised] = []
        for appraiser in appraisers:
            below_s = best[-1].seconds if len(best) == FINALISTS else math.inf
            best += best_of_all(appraiser, keep=FINALISTS, below_s=below_s)
            best = sorted(best, key=lambda each: each.seconds)[:FINALISTS]
        if best:
            return [each.structure for each in best]
        return fitting(
            problem,
            [structure for each in appraisers for structure in each.least_structures(set_partitions(count))],
        )
