"""A priced plan from a structure."""

from __future__ import annotations

from muxtune.plan import Plan
from muxtune.planning.decisions.structure import PlanStructure
from muxtune.planning.problem.derive import decide, derive_plan, scheduled_iterations
from muxtune.planning.problem.problem import PlanningProblem
from muxtune.schedule import Action, build_schedule, inject, injected_iteration_s


def structure_schedule(structure: PlanStructure) -> list[list[Action]]:
    """Action lists of the structure's scheduled iterations."""
    return build_schedule(
        structure.buckets,
        structure.microbatches,
        pp=structure.pp,
        template=structure.template,
        steps=[_iterations(structure)] * len(structure.htasks),
        instances=[htask.instance for htask in structure.htasks],
        co_scheduled=structure.orchestration.shares_clocks,
        carries=structure.carries,
        injection=structure.injection,
        in_flight=structure.in_flight,
    )


def structure_iteration_s(problem: PlanningProblem, structure: PlanStructure) -> float:
    """Steady iteration time by the recurrence; what candidates are compared by."""
    injection = inject(
        structure.buckets,
        structure.microbatches,
        template=structure.template,
        steps=[_iterations(structure)] * len(structure.htasks),
        instances=[htask.instance for htask in structure.htasks],
        co_scheduled=structure.orchestration.shares_clocks,
        carries=structure.carries,
        injection=structure.injection,
        in_flight=structure.in_flight,
    )
    return injected_iteration_s(injection, problem.times(structure))


def _iterations(structure: PlanStructure) -> int:
    return scheduled_iterations(structure.template)


def assemble_plan(problem: PlanningProblem, structure: PlanStructure, policy: str) -> Plan:
    """The plan of a structure's decisions, with the recurrence's prediction.

    Raises:
        SpecError: The structure contradicts itself; see :func:`muxtune.plan.check_plan`.
    """
    return derive_plan(problem, decide(problem, structure, policy))
