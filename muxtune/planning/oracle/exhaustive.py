"""The best of all partitions of tasks into hTasks.

The number of partitions of n tasks is Bell's: 52 for 5, 4140 for 8, 21147 for 9.
"""

from __future__ import annotations

import math

from muxtune.planning.decisions.options import PlanOptions
from muxtune.planning.decisions.structure import HTaskChoice
from muxtune.planning.problem.carrying import may_carry
from muxtune.planning.problem.layouts import cheapest_alignment, shortest_alignment
from muxtune.planning.problem.meshes import choose_mesh
from muxtune.planning.problem.problem import PlanningProblem
from muxtune.planning.problem.spreading import may_spread
from muxtune.planning.refinement.appraiser import Appraised, Appraiser
from muxtune.planning.refinement.groups import GroupTable


def task_appraiser(
    problem: PlanningProblem, options: PlanOptions, *, shortest: bool = False, widely: bool = False
) -> Appraiser:
    """Appraiser for all partitions of a problem's tasks, on layers that are balanced for the tasks alone.

    Args:
        problem: The planning problem.
        options: Decisions that are fixed.
        shortest: Whether groups lie in their shortest streams, which may fit where the fastest do not.
        widely: Whether long micro-batches are spread, and cut to the paces of single tasks, too.

    Raises:
        SpecError: The cluster has no such mesh.
    """
    alone = [
        HTaskChoice(task_ids=(task_id,), shape=problem.shape((task_id,), "pack", dp=options.dp or 1))
        for task_id in problem.data
    ]
    mesh = choose_mesh(problem, alone, options)
    align = (shortest_alignment if shortest else cheapest_alignment)(problem, mesh, options)
    templates = options.templates(problem.settings.templates)
    table = GroupTable(problem, mesh, align, one_method=options.one_method)
    return Appraiser(table, templates, cut=may_carry(options), widely=widely and may_spread(options))


def best_of_all(appraiser: Appraiser, *, keep: int = 1, below_s: float = math.inf) -> list[Appraised]:
    """The best of all set partitions, fastest first; none if no partition fits the memory.

    They are appraised by ascending bound, until the bound of the next one is no better than what is kept.

    Args:
        appraiser: Appraiser of the problem.
        keep: Partitions at most.
        below_s: Slower ones do not matter.
    """
    table = appraiser.table
    count = len(table.task_ids)
    excluded: set[int] = set()
    if not appraiser.cut:  # cut, a group may fit
        shared = filter(table.may_share, range(1, 1 << count))
        excluded = {mask for mask in shared if table.exceeds_alone(mask)}
        appraiser.misfits |= bool(excluded)
    bounds = sorted(
        (appraiser.bound_s(groups), groups) for groups in table.partitions() if excluded.isdisjoint(groups)
    )
    best: list[Appraised] = []
    for bound_s, groups in bounds:
        to_beat_s = best[-1].seconds if len(best) == keep else below_s
        if bound_s >= to_beat_s:
            break
        found = appraiser.appraise(groups, to_beat_s)
        if found is not None:
            best = sorted([*best, found], key=lambda each: each.seconds)[:keep]
    return best


def best_in_all_streams(
    problem: PlanningProblem, options: PlanOptions, *, keep: int = 1, below_s: float = math.inf
) -> tuple[list[Appraised], list[Appraiser]]:
    """As :func:`best_of_all`; where the memory refuses something, groups lie in the shortest streams, too.

    Where it refuses everything, long micro-batches are spread.

    Returns:
        The best, and the appraisers that found them: the one of the fastest streams first.

    Raises:
        SpecError: The cluster has no such mesh.
    """
    appraisers = [task_appraiser(problem, options)]
    best = best_of_all(appraisers[0], keep=keep, below_s=below_s)
    if appraisers[0].misfits:
        appraisers.append(task_appraiser(problem, options, shortest=True))
        known = {each.structure for each in best}
        found = best_of_all(appraisers[1], keep=keep, below_s=below_s)
        best += [each for each in found if each.structure not in known]
    if not best and math.isinf(below_s):
        appraisers += [task_appraiser(problem, options, shortest=each, widely=True) for each in (False, True)]
        best = [found for each in appraisers[-2:] for found in best_of_all(each, keep=keep)]
    return sorted(best, key=lambda each: each.seconds)[:keep], appraisers
