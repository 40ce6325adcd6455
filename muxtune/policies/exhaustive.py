"""The best fusion there is, for a few tasks: what other policies are measured against."""

from __future__ import annotations

import math
from dataclasses import replace

from muxtune.planning.decisions.options import PlanOptions
from muxtune.planning.decisions.partition_dp import set_partitions
from muxtune.planning.decisions.structure import PlanStructure
from muxtune.planning.oracle.exhaustive import best_in_all_streams
from muxtune.planning.problem.memory_limit import fitting
from muxtune.planning.problem.mesh_bounds import layer_seconds, least_iteration_s
from muxtune.planning.problem.meshes import candidate_meshes
from muxtune.planning.problem.objectives import find_objective
from muxtune.planning.problem.problem import PlanningProblem
from muxtune.planning.problem.schedules import in_order
from muxtune.planning.refinement.appraiser import Appraised, Appraiser
from muxtune.policies.base import POLICIES
from muxtune.support.errors import SpecError

MOST_TASKS = 9
"""21147 partitions; 10 tasks would have 115975."""

PARTITIONS_KEPT = 4
"""Partitions that are handed on."""


@POLICIES.register("exhaustive")
class Exhaustive:
    """Every set partition of the tasks on every mesh, with layers per stage balanced for the tasks alone.

    The optimum is over meshes, partitions, groupings and templates, with the cheapest alignment of every
    group, or the shortest streams of all where the memory refuses those, by the recurrence and within the
    memory. Only what a bound proves to be no better is left out.
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
        if options.objective != "iteration":
            asked = find_objective(options.objective).name
            raise SpecError("--objective", asked, "iteration: exhaustive leaves out what bounds prove slower")
        count = len(problem.data)
        if count > MOST_TASKS:
            expected = f"at most {MOST_TASKS} for the policy exhaustive, whose partitions it tries one by one"
            raise SpecError("number of tasks", count, expected)
        shapes = candidate_meshes(problem.model, problem.cluster, options, idle=True)
        appraisers: list[Appraiser] = []
        layer_work_s: dict[int, float] = {}  # of the best partition, of all replicas, by tp
        best: list[Appraised] = []
        for shape in shapes:
            below_s = best[-1].seconds if len(best) == PARTITIONS_KEPT else math.inf
            least_s = least_iteration_s(layer_work_s.get(shape.tp, 0.0), shape, problem.model.layers)
            if shape.ranks < shapes[0].ranks and problem.settings.least_work * least_s >= below_s:
                continue
            found, used = best_in_all_streams(
                problem, replace(options, **shape._asdict()), keep=PARTITIONS_KEPT, below_s=below_s
            )
            appraisers += used
            known_s = layer_work_s.get(shape.tp, math.inf)
            layer_work_s[shape.tp] = min(known_s, _least_layer_work_s(used[0]))
            best += found
            best = sorted(best, key=lambda each: each.seconds)[:PARTITIONS_KEPT]
        if best:
            return [each.structure for each in best]
        return fitting(
            problem,
            [structure for each in appraisers for structure in each.least_structures(set_partitions(count))],
        )


def _least_layer_work_s(appraiser: Appraiser) -> float:
    """Least work of a partition in an iteration, in a layer of all replicas."""
    table = appraiser.table
    works_s = [0.0]  # of every group
    for mask in range(1, 1 << len(table.task_ids)):
        alone = in_order([table[mask].choice], table.mesh, "continuous")
        works_s.append(sum(layer_seconds(table.problem, alone)))
    least = [0.0]  # of the tasks of every mask
    for mask in range(1, 1 << len(table.task_ids)):
        first = mask & -mask
        group, totals = mask, []
        while group:  # all groups that have the mask's first task
            if group & first:
                totals.append(works_s[group] + least[mask ^ group])
            group = (group - 1) & mask
        least.append(min(totals))
    return least[-1]
