"""The search: a policy proposes, the recurrence ranks, the best are written as plans."""

from __future__ import annotations

from muxtune.cluster import ClusterSpec
from muxtune.costs.base import CostModel
from muxtune.errors import SpecError
from muxtune.model import ModelSpec
from muxtune.plan import Plan
from muxtune.planning.assemble import assemble_plan, structure_iteration_s
from muxtune.planning.options import FREE, PlanOptions
from muxtune.planning.problem import PlanningProblem
from muxtune.policies.base import POLICIES
from muxtune.workload import Workload

FINALISTS = 4
"""Plans handed to the simulator."""


def plan_workload(
    workload: Workload,
    model: ModelSpec,
    cluster: ClusterSpec,
    costs: CostModel,
    *,
    policy: str = "muxtune",
    options: PlanOptions = FREE,
) -> list[Plan]:
    """The best plans of a policy by the recurrence, fastest first.

    Raises:
        UserError: Unknown policy, a task or option that cannot be, or no plan that fits the memory.
    """
    return plan_problem(PlanningProblem(workload, model, cluster, costs), policy=policy, options=options)


def plan_problem(
    problem: PlanningProblem, *, policy: str = "muxtune", options: PlanOptions = FREE
) -> list[Plan]:
    """:func:`plan_workload` for a problem whose data is loaded, so that policies can share it."""
    for name, asked in (("--tp", options.tp), ("--pp", options.pp), ("--dp", options.dp)):
        if asked is not None and not 1 <= asked <= problem.cluster.ranks:
            expected = f"1 to {problem.cluster.ranks}, the ranks of {problem.cluster.name}"
            raise SpecError(name, asked, expected)
    with problem.costs.exploring():
        structures = POLICIES.get(policy).propose(problem, options)
        ranked = sorted(structures, key=lambda s: structure_iteration_s(problem, s))
    problem.price_again(ranked[0])
    return [assemble_plan(problem, structure, policy) for structure in ranked[:FINALISTS]]
