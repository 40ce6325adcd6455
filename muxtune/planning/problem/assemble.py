"""A priced plan from a structure."""

from __future__ import annotations

from muxtune.model import backbone_digest
from muxtune.plan import (
    SCHEMA_VERSION,
    Execution,
    HTask,
    Parallelism,
    Plan,
    check_plan,
    finish_plan,
    predict,
    theoretical_bubble_fraction,
)
from muxtune.planning.decisions.structure import HTaskChoice, PlanStructure
from muxtune.planning.problem.problem import PlanningProblem
from muxtune.schedule import Action, build_schedule, evaluate_schedule, inject, injected_iteration_s
from muxtune.tasks import with_digest

CONTINUOUS_ITERATIONS = 4
"""Iterations that a continuous plan schedules: one fills, one drains, two are steady."""


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
    )
    return injected_iteration_s(injection, problem.times(structure))


def _iterations(structure: PlanStructure) -> int:
    return 1 if structure.template in {"flush", "gpipe"} else CONTINUOUS_ITERATIONS


def assemble_plan(problem: PlanningProblem, structure: PlanStructure, policy: str) -> Plan:
    """The plan of a structure, with the recurrence's prediction.

    Raises:
        SpecError: The structure contradicts itself; see :func:`muxtune.plan.check_plan`.
    """
    actions = structure_schedule(structure)
    times = problem.times(structure)
    predicted = predict(
        evaluate_schedule(actions, times),
        times=times,
        microbatches=structure.microbatches,
        tokens=problem.iteration_tokens(structure),
        peak_memory_bytes=[stage.total_bytes for stage in problem.memory(structure, actions)],
        theoretical_bubble_fraction=theoretical_bubble_fraction(
            structure.buckets,
            structure.microbatches,
            pp=structure.pp,
            template=structure.template,
            instances=[htask.instance for htask in structure.htasks],
            co_scheduled=structure.orchestration.shares_clocks,
        ),
        alignment=problem.alignment_report(structure),
    )
    tasks = tuple(task.model_copy(update={"dataset": with_digest(task.dataset)}) for task in problem.tasks)
    plan = Plan(
        schema_version=SCHEMA_VERSION,
        model=problem.model,
        backbone=backbone_digest(problem.model),
        cluster=problem.cluster,
        costs=problem.costs.ref.model_copy(update={"notes": problem.cost_notes(structure)}),
        policy=policy,
        parallelism=Parallelism(
            tp=structure.mesh.tp,
            pp=structure.pp,
            dp=structure.mesh.dp,
            layers_per_stage=structure.layers_per_stage,
        ),
        tasks=tasks,
        htasks=tuple(_htask(i, choice) for i, choice in enumerate(structure.htasks)),
        buckets=structure.buckets,
        template=structure.template,
        orchestration=structure.orchestration.model_copy(update={"launches": problem.launches(structure)}),
        execution=Execution(attention=problem.costs.attention),
        schedule=tuple(tuple((a.kind, a.htask, a.number) for a in stage) for stage in actions),
        predicted=predicted,
    )
    plan = finish_plan(plan)
    check_plan(plan)
    return plan


def _htask(position: int, choice: HTaskChoice) -> HTask:
    shape = choice.shape
    return HTask(
        id=position,
        task_ids=choice.task_ids,
        alignment=shape.alignment,
        chunk_tokens=shape.row_tokens if shape.alignment == "chunk" else None,
        microbatches=shape.microbatches,
        carry_microbatches=shape.carry,
        tokens_per_microbatch=shape.tokens,
        instance=choice.instance,
    )
