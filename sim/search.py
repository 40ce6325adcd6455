"""Plan search: cheap evaluation of all candidates, SimPy for the finalists."""

from __future__ import annotations

from muxtune.cluster import ClusterSpec
from muxtune.costs.base import CostModel
from muxtune.model import ModelSpec
from muxtune.plan import Decisions, Plan
from muxtune.plan.check import PART
from muxtune.planning.decisions.options import PlanOptions
from muxtune.planning.problem.derive import derive_plan
from muxtune.planning.problem.problem import PlanningProblem
from muxtune.policies import Policy, plan_problem
from muxtune.tasks import Workload
from sim.simulate import simulate_plan


def search_plan(
    workload: Workload,
    model: ModelSpec,
    cluster: ClusterSpec,
    costs: CostModel,
    *,
    policy: str | Policy = "muxtune",
    options: PlanOptions | None = None,
) -> Plan:
    """Best plan of a policy, by simulated iteration time or the objective of the options.

    Args:
        workload: Workload with the tasks.
        model: Backbone of the tasks.
        cluster: Cluster that they run on.
        costs: Operator costs of the cluster's device.
        policy: A name of the policy registry, or an object that is a policy.
        options: Decisions that are not left to the search.

    Returns:
        A plan whose ``predicted`` comes from the simulator.

    Raises:
        UserError: Unknown policy, a task that cannot run on this backbone, or nothing fits the cluster.
    """
    return search_problem(PlanningProblem(workload, model, cluster, costs), policy=policy, options=options)


def search_problem(
    problem: PlanningProblem, *, policy: str | Policy = "muxtune", options: PlanOptions | None = None
) -> Plan:
    """:func:`search_plan` for a problem whose data is loaded, so that policies can share it."""
    finalists = plan_problem(problem, policy=policy, options=options or PlanOptions())
    simulated = [plan.with_predicted(simulate_plan(plan).predicted) for plan in finalists]
    if finalists[0].decisions.objective != "iteration":  # they stand in its order
        return simulated[0]
    return min(simulated, key=lambda plan: plan.predicted.iteration_s)


def price_decisions(
    problem: PlanningProblem, decisions: Decisions, where: str = "plan", *, part: str = PART
) -> Plan:
    """The plan of some decisions, by simulated iteration time: nothing is searched.

    Args:
        problem: The decisions' tasks, backbone and cluster, with the costs to price them.
        decisions: What is decided.
        where: The file or object in front of a field's name.
        part: What else stands in front of the name of a decision.

    Raises:
        UserError: See :func:`muxtune.planning.problem.derive.derive_plan`.
    """
    plan = derive_plan(problem, decisions, where, part=part)
    return plan.with_predicted(simulate_plan(plan).predicted)
