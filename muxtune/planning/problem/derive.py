"""The one way to a plan: from its decisions, of which the rest is derived and priced."""

from __future__ import annotations

from collections.abc import Sequence

from muxtune.model import backbone_digest
from muxtune.peft import start_digest
from muxtune.plan import (
    Decisions,
    Derived,
    Execution,
    HTaskDecision,
    MicrobatchShape,
    Orchestration,
    OrchestrationDecision,
    Parallelism,
    Plan,
    check_decisions,
    check_plan,
    finish_plan,
    ideal_iteration_s,
    predict,
    theoretical_bubble_fraction,
)
from muxtune.plan.check import PART, naming_part
from muxtune.planning.decisions.structure import HTaskChoice, Layout, Mesh, PlanStructure
from muxtune.planning.exact.utilization import useful_flops
from muxtune.planning.problem.problem import PlanningProblem
from muxtune.schedule import Template, build_schedule, check_own_order, evaluate_schedule
from muxtune.support.errors import SpecError
from muxtune.tasks import PeftTask, with_digest

CONTINUOUS_ITERATIONS = 4
"""Iterations that a continuous plan schedules: one fills, one drains, two are steady."""


def scheduled_iterations(template: Template) -> int:
    """Iterations that a plan of a template schedules."""
    return 1 if template in {"flush", "gpipe"} else CONTINUOUS_ITERATIONS


def decide(problem: PlanningProblem, structure: PlanStructure, policy: str) -> Decisions:
    """What a structure decides, as a plan has it.

    Micro-batches are written down where they are more than the layout asks for.
    """
    mesh, orchestration = structure.mesh, structure.orchestration
    return Decisions(
        policy=policy,
        model=problem.model,
        cluster=problem.cluster,
        costs=problem.costs.ref,
        parallelism=Parallelism(
            tp=mesh.tp, pp=mesh.pp, dp=mesh.dp, layers_per_stage=structure.layers_per_stage
        ),
        tasks=tuple(problem.tasks),
        htasks=tuple(_decided_htask(problem, choice, mesh) for choice in structure.htasks),
        buckets=structure.buckets,
        template=structure.template,
        injection=structure.injection,
        in_flight=structure.in_flight,
        orchestration=OrchestrationDecision(mode=orchestration.mode, adapters=orchestration.adapters),
        execution=Execution(attention=problem.costs.attention),
    )


def _decided_htask(problem: PlanningProblem, choice: HTaskChoice, mesh: Mesh) -> HTaskDecision:
    layout, microbatches = choice.layout, choice.shape.microbatches
    fewest = problem.shape(choice.task_ids, *layout, dp=mesh.dp).microbatches
    return HTaskDecision(
        task_ids=choice.task_ids,
        alignment=layout.alignment,
        chunk_tokens=layout.chunk_tokens,
        carry_microbatches=layout.carry,
        microbatches=None if microbatches == fewest else microbatches,
        instance=choice.instance,
    )


def structure_of(problem: PlanningProblem, decisions: Decisions) -> PlanStructure:
    """The structure that decisions describe, with the shapes that follow from the problem's data.

    Raises:
        SpecError: A sequence does not fit the layout.
    """
    p, mode = decisions.parallelism, decisions.orchestration.mode
    contention = 0.0 if mode == "sequential" else problem.costs.contention or 0.0
    return PlanStructure(
        htasks=tuple(htask_choice(problem, htask, p.dp) for htask in decisions.htasks),
        buckets=decisions.buckets,
        template=decisions.template,
        injection=decisions.injection,
        in_flight=decisions.in_flight,
        mesh=Mesh(p.layers_per_stage, p.tp, p.dp),
        orchestration=Orchestration(
            mode=mode, contention=contention, adapters=decisions.orchestration.adapters
        ),
    )


def htask_choice(problem: PlanningProblem, htask: HTaskDecision, dp: int) -> HTaskChoice:
    """A decided hTask with the shape that its data has on ``dp`` replicas.

    Raises:
        SpecError: A sequence does not fit the layout.
    """
    layout = Layout(htask.alignment, htask.chunk_tokens, htask.carry_microbatches)
    shape = problem.shape(htask.task_ids, *layout, dp=dp, microbatches=htask.microbatches)
    return HTaskChoice(task_ids=htask.task_ids, shape=shape, instance=htask.instance)


def derive_plan(
    problem: PlanningProblem, decisions: Decisions, where: str = "plan", *, part: str = PART
) -> Plan:
    """The plan of some decisions, with the recurrence's prediction.

    Args:
        problem: The decisions' tasks, backbone and cluster, with the costs to price them.
        decisions: What is decided; its costs become those of the problem.
        where: The file or object in front of a field's name.
        part: What else stands in front of the name of a decision.

    Raises:
        UserError: The decisions contradict each other or do not fit the memory, or the costs do not have what
            they need.
    """
    decisions = decisions.model_copy(update={"costs": problem.costs.ref})
    check_decisions(decisions, where, part)
    _check_costs(problem, decisions, f"{where}: {part}")
    structure = structure_of(problem, decisions)
    with naming_part(f"{where}: {part}"):
        check_own_order(
            structure.microbatches,
            pp=structure.pp,
            injection=structure.injection,
            in_flight=structure.in_flight,
            carries=structure.carries,
            co_scheduled=structure.orchestration.shares_clocks,
        )
    actions = build_schedule(
        structure.buckets,
        structure.microbatches,
        pp=structure.pp,
        template=structure.template,
        steps=[scheduled_iterations(structure.template)] * len(structure.htasks),
        instances=[htask.instance for htask in structure.htasks],
        co_scheduled=structure.orchestration.shares_clocks,
        carries=structure.carries,
        injection=structure.injection,
        in_flight=structure.in_flight,
    )
    times = problem.times(structure)
    derived = Derived(
        backbone=backbone_digest(problem.model),
        dataset_sha256=tuple(with_digest(task.dataset).sha256 for task in decisions.tasks),
        init_sha256=_init_digests(decisions.tasks),
        htasks=tuple(
            MicrobatchShape(microbatches=h.shape.microbatches, tokens_per_microbatch=h.shape.tokens)
            for h in structure.htasks
        ),
        schedule=tuple(tuple((a.kind, a.htask, a.number) for a in stage) for stage in actions),
        contention=structure.orchestration.contention,
        launches=problem.launches(structure),
        useful_flops=useful_flops(problem.model, problem.data.values()),
        cost_notes=problem.cost_notes(structure),
    )
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
            injection=structure.injection,
        ),
        alignment=problem.alignment_report(structure),
        ideal_s=ideal_iteration_s(decisions, derived),
    )
    plan = finish_plan(Plan(decisions=decisions, derived=derived, predicted=predicted))
    check_plan(plan, where)
    return plan


def _init_digests(tasks: Sequence[PeftTask]) -> tuple[str | None, ...]:
    """Digests of the saved adapters that tasks start from; empty where none does."""
    digests = tuple(
        None if task.peft.init is None else start_digest(task.peft.init, f"tasks.{task.id}.peft.init")
        for task in tasks
    )
    return digests if any(digests) else ()


def _check_costs(problem: PlanningProblem, decisions: Decisions, prefix: str) -> None:
    """Refuse what the costs have no times of."""
    costs, asked = problem.costs, decisions.execution.attention
    if asked != costs.attention:
        expected = f"{costs.attention}, the backend whose times {costs.ref.profile_id} has"
        raise SpecError(f"{prefix}execution.attention", asked, expected)
    most, p = costs.largest_group, decisions.parallelism
    for name, ranks in (("tp", p.tp), ("dp", p.dp)):
        if most is not None and ranks > most:
            expected = f"at most {most}, the ranks of the largest collective that {costs.ref.profile_id} has"
            raise SpecError(f"{prefix}parallelism.{name}", ranks, expected)
