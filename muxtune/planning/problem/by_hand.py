"""Decisions that a person wrote, with the rest chosen by the defaults that docs/files.md lists."""

from __future__ import annotations

from collections.abc import Sequence

from muxtune.plan import Decisions, Execution, HTaskDecision, Parallelism
from muxtune.plan.by_hand import HandDecisions, HandHTask, HandParallelism
from muxtune.planning.decisions.options import PlanOptions
from muxtune.planning.decisions.structure import Mesh
from muxtune.planning.problem.derive import htask_choice
from muxtune.planning.problem.layouts import alignment_candidates, cheapest_layout
from muxtune.planning.problem.meshes import choose_layers
from muxtune.planning.problem.problem import PlanningProblem
from muxtune.support.errors import SpecError


def complete_decisions(problem: PlanningProblem, hand: HandDecisions, where: str) -> Decisions:
    """All decisions of a plan.

    Args:
        problem: Workload, backbone and cluster that the file names, with the costs to choose by.
        hand: What the file says.
        where: The file, in front of a field's name.

    Raises:
        SpecError: A task is unknown, the ranks do not suffice, or a layout contradicts itself.
    """
    written = hand.htasks or tuple(HandHTask(task_ids=(task.id,)) for task in problem.tasks)
    _check_tasks(problem, written, where)
    pp = _stages(problem, hand.parallelism, where)
    tp, dp = hand.parallelism.tp, hand.parallelism.dp
    layers = problem.model.layers
    even = Mesh(tuple(layers // pp + (stage < layers % pp) for stage in range(pp)), tp, dp)
    htasks = tuple(
        _decided(problem, even, each, f"{where}: htasks[{position}]") for position, each in enumerate(written)
    )
    split = hand.parallelism.layers_per_stage
    if split is None:
        choices = [htask_choice(problem, htask, dp) for htask in htasks]
        split = choose_layers(problem, choices, pp, tp=tp, dp=dp).layers_per_stage
    each = range(len(htasks))
    together = (tuple(each),) if hand.orchestration.shares_clocks else tuple((h,) for h in each)
    return Decisions(
        policy=hand.policy,
        model=problem.model,
        cluster=problem.cluster,
        costs=problem.costs.ref,
        parallelism=Parallelism(tp=tp, pp=pp, dp=dp, layers_per_stage=split),
        tasks=tuple(problem.tasks),
        htasks=htasks,
        buckets=together if hand.buckets is None else hand.buckets,
        template=hand.template,
        injection=hand.injection,
        in_flight=hand.in_flight,
        orchestration=hand.orchestration,
        execution=Execution(attention=hand.execution.attention or problem.costs.attention),
    )


def _check_tasks(problem: PlanningProblem, htasks: Sequence[HandHTask], where: str) -> None:
    for position, htask in enumerate(htasks):
        for task_id in htask.task_ids:
            if task_id not in problem.data:
                expected = f"one of {', '.join(problem.data)}"
                raise SpecError(f"{where}: htasks[{position}].task_ids", task_id, expected)


def _stages(problem: PlanningProblem, parallelism: HandParallelism, where: str) -> int:
    """Pipeline stages: as written, or as there are ranks for."""
    ranks, field = problem.cluster.ranks, f"{where}: parallelism"
    tp, dp, split = parallelism.tp, parallelism.dp, parallelism.layers_per_stage
    left = min(ranks // (tp * dp), problem.model.layers)
    pp = parallelism.pp or (left if split is None else len(split))
    if not 1 <= pp * tp * dp <= ranks:
        expected = f"at most {ranks}, the ranks of {problem.cluster.name}"
        raise SpecError(f"{field} (tp * pp * dp)", tp * max(pp, 1) * dp, expected)
    if pp > problem.model.layers:
        expected = f"at most {problem.model.layers}, the layers of {problem.model.name}"
        raise SpecError(f"{field}.pp", pp, expected)
    return pp


def _decided(problem: PlanningProblem, mesh: Mesh, htask: HandHTask, field: str) -> HTaskDecision:
    options = PlanOptions(
        alignment=htask.alignment,
        chunk_tokens=htask.chunk_tokens,
        carry=None if htask.carry_microbatches == 1 else htask.carry_microbatches,
    )
    if htask.alignment not in {None, "chunk"} and (options.carry or options.chunk_tokens):
        name = "chunk_tokens" if options.chunk_tokens else "carry_microbatches"
        expected = f"nothing: the alignment is {htask.alignment}"
        raise SpecError(f"{field}.{name}", options.chunk_tokens or options.carry, expected)
    if options.carry is not None and options.carry & (options.carry - 1):
        raise SpecError(f"{field}.carry_microbatches", options.carry, "a power of two")
    layouts = alignment_candidates(problem, htask.task_ids, options)
    layout = cheapest_layout(problem, mesh, htask.task_ids, layouts).layout
    return HTaskDecision(
        task_ids=htask.task_ids,
        alignment=layout.alignment,
        chunk_tokens=layout.chunk_tokens,
        carry_microbatches=layout.carry,
        microbatches=htask.microbatches,
        instance=htask.instance,
    )
