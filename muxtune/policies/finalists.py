"""The search: a policy proposes, the recurrence ranks, the best are written as plans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from muxtune.cluster import ClusterSpec
from muxtune.costs.base import CostModel
from muxtune.model import ModelSpec
from muxtune.plan import Plan
from muxtune.planning.decisions.options import FREE, PlanOptions
from muxtune.planning.decisions.structure import PlanStructure
from muxtune.planning.problem.assemble import assemble_plan, structure_iteration_s
from muxtune.planning.problem.objectives import Objective, find_objective
from muxtune.planning.problem.problem import PlanningProblem
from muxtune.policies.base import Policy
from muxtune.policies.chosen import choose_policy
from muxtune.policies.proposed import proposed_structures
from muxtune.policies.switches import label, refuse_switches
from muxtune.schedule import lower_bound_s
from muxtune.support.errors import SpecError
from muxtune.tasks import Workload

FINALISTS = 4
"""Plans handed to the simulator."""


def plan_workload(
    workload: Workload,
    model: ModelSpec,
    cluster: ClusterSpec,
    costs: CostModel,
    *,
    policy: str | Policy = "muxtune",
    options: PlanOptions = FREE,
) -> list[Plan]:
    """The best plans of a policy by the recurrence, fastest first.

    Args:
        workload: Tasks.
        model: Backbone of the tasks.
        cluster: Where they run.
        costs: Prices of operators there; costs of one's own are asked as those that ship are.
        policy: A name of :data:`muxtune.policies.POLICIES`, or any object that is a policy.
        options: Decisions that are taken away from the policy.

    Raises:
        UserError: Unknown policy, a task or option that cannot be, or no plan that fits the memory.
    """
    return plan_problem(PlanningProblem(workload, model, cluster, costs), policy=policy, options=options)


def check_ranks(cluster: ClusterSpec, options: PlanOptions) -> None:
    """Refuse numbers of shards, stages or replicas that are beyond the ranks of a cluster.

    Raises:
        SpecError: Names the option.
    """
    for name, asked in (("--tp", options.tp), ("--pp", options.pp), ("--dp", options.dp)):
        if asked is not None and not 1 <= asked <= cluster.ranks:
            expected = f"1 to {cluster.ranks}, the ranks of {cluster.name}"
            raise SpecError(name, asked, expected)


def plan_problem(
    problem: PlanningProblem, *, policy: str | Policy = "muxtune", options: PlanOptions = FREE
) -> list[Plan]:
    """:func:`plan_workload` for a problem whose data is loaded, so that policies can share it.

    Raises:
        UserError: See :func:`plan_workload`.
    """
    check_ranks(problem.cluster, options)
    chosen, objective = choose_policy(policy), find_objective(options.objective)
    refuse_switches(chosen, options)
    options = replace(options, policy_options=chosen.check_options(options.policy_options))
    with problem.costs.exploring():
        structures = proposed_structures(chosen, problem, options)
        with chosen.blamed("pricing what it proposes"):
            ranked = best(problem, _known(problem, structures), FINALISTS, objective)
    with chosen.blamed("pricing what it proposes"):
        problem.price_again(ranked[0])
        plans = [assemble_plan(problem, structure, label(chosen.name, options)) for structure in ranked]
    own = options.policy_options
    values = {} if own is None else own.model_dump(mode="json")
    return [plan.with_decisions(objective=objective.name, policy_options=values) for plan in _fitting(plans)]


def _fitting(plans: Sequence[Plan]) -> list[Plan]:
    """The plans that fit, whatever a policy thought of its structures."""
    limit = plans[0].cluster.device.memory_bytes
    fit = [plan for plan in plans if max(plan.predicted.peak_memory_bytes) <= limit]
    if not fit:
        least = min(max(plan.predicted.peak_memory_bytes) for plan in plans)
        field = f"cluster.device.memory_bytes of {plans[0].cluster.name}"
        raise SpecError(field, limit, f"at least {least}, for the plan of {plans[0].policy} that needs least")
    return fit


def _known(problem: PlanningProblem, structures: Sequence[PlanStructure]) -> list[PlanStructure]:
    """Structures whose collectives the costs know.

    Raises:
        SpecError: No candidate is left.
    """
    most = problem.costs.largest_group
    if most is None or not structures:
        return list(structures)
    known = [each for each in structures if max(each.mesh.tp, each.mesh.dp) <= most]
    if not known:
        mesh, ref = structures[0].mesh, problem.costs.ref
        expected = f"at most {most}, the ranks of the largest collective that {ref.profile_id} has"
        raise SpecError("--tp and --dp", f"{mesh.tp} and {mesh.dp}", f"{expected} (muxtune profile --ranks)")
    return known


def best(
    problem: PlanningProblem, structures: Sequence[PlanStructure], count: int, objective: Objective
) -> list[PlanStructure]:
    """The ``count`` structures that an objective puts first."""
    if objective.is_iteration:
        return fastest(problem, structures, count)
    return sorted(structures, key=lambda structure: objective.score(problem, structure))[:count]


def fastest(problem: PlanningProblem, structures: Sequence[PlanStructure], count: int) -> list[PlanStructure]:
    """The ``count`` structures with the shortest iterations by the recurrence, fastest first.

    Structures are looked at by ascending work of their busiest stage. No iteration is shorter than that, so
    the search ends where it exceeds the iterations that were found; ties go to what was proposed first.
    """
    bounds_s = [lower_bound_s(problem.times(each), each.microbatches) for each in structures]
    found: list[tuple[float, int]] = []  # seconds, position
    for position in sorted(range(len(structures)), key=lambda i: bounds_s[i]):
        if len(found) == count and bounds_s[position] > found[-1][0]:
            break
        found.append((structure_iteration_s(problem, structures[position]), position))
        found = sorted(found)[:count]
    return [structures[position] for _, position in found]
