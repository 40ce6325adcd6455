"""The schedule of a whole run, made from the few iterations that a plan shows."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from muxtune.plan.plan import Plan
from muxtune.schedule import Action, build_schedule
from muxtune.support.errors import SpecError


def extend_schedule(plan: Plan, iterations: int, *, first: int = 0) -> list[list[Action]]:
    """Action lists of all stages for ``iterations`` iterations.

    A schedule that the generator would write is generated for the wanted length. Any other (made by hand) is
    repeated as it stands, its numbers counted on; it drains at its end, so the copies do not interfere. An
    hTask leaves the rotation after its own last step.

    Args:
        plan: Plan that has been checked.
        iterations: Iterations of the whole run; at most the steps of the longest task.
        first: Iterations that are already done and left out; the numbers still count from the start.

    Returns:
        One list per stage.

    Raises:
        SpecError: More iterations than any task has steps, or no multiple of a hand-made schedule's.
    """
    longest = max(plan.htask_steps())
    if not 0 < iterations <= longest:
        raise SpecError("steps", iterations, f"1 to {longest}, the steps of the longest task")
    steps = plan.htask_steps(iterations)
    whole = _generate(plan, steps) if _is_generated(plan) else _repeat(plan, iterations, steps)
    m = plan.microbatches
    return [[a for a in stage if _step_of(a, m) >= first] for stage in whole]


def check_step_meetings(stages: Sequence[Sequence[Action]], meeting: Collection[int], where: str) -> None:
    """Refuse a schedule in which the stages might not meet at the optimizer steps of some hTasks.

    At each step the stages tell each other whether it is sound, so all of them have the steps in one order.
    Clipping by the global norm sums over all stages, so each waits at that step for the others. All stages
    play their backwards in the same order; if the step follows its last backward at once, or after the same
    backwards and steps on every stage (the rest of a clock, as generated schedules have it), then no stage
    needs anything from beyond the meeting, and there is no deadlock.

    Args:
        stages: A valid schedule.
        meeting: hTasks that have a task with ``max_grad_norm``.
        where: The file or object in front of the field's name.

    Raises:
        SpecError: A step of those hTasks stands elsewhere, or a stage has steps in another order.
    """
    reference: dict[Action, list[Action]] = {}
    _check_step_order(stages, where)
    for stage, actions in enumerate(stages):
        for slot, action in enumerate(actions):
            if action.kind != "STEP" or action.htask not in meeting:
                continue
            between = _since_last_backward(actions, slot)
            same = reference.setdefault(action, between) == between
            if not same or any(entry.kind == "F" for entry in between):
                expected = f"a place right after the last backward, as hTask {action.htask} has max_grad_norm"
                raise SpecError(f"{where}: derived.schedule[{stage}][{slot}]", str(action), expected)


def _check_step_order(stages: Sequence[Sequence[Action]], where: str) -> None:
    first, *others = [[(slot, a) for slot, a in enumerate(actions) if a.kind == "STEP"] for actions in stages]
    for stage, steps in enumerate(others, start=1):
        for (_, expected), (slot, action) in zip(first, steps, strict=True):
            if action != expected:
                field = f"{where}: derived.schedule[{stage}][{slot}]"
                raise SpecError(field, str(action), f"{expected}, as stages play their STEPs in one order")


def _since_last_backward(actions: Sequence[Action], slot: int) -> list[Action]:
    """What stands between an hTask's last backward and its STEP in ``slot``."""
    first = slot
    while (actions[first - 1].kind, actions[first - 1].htask) != ("B", actions[slot].htask):
        first -= 1
    return list(actions[first:slot])


def _is_generated(plan: Plan) -> bool:
    shown = plan.predicted.scheduled_iterations
    if shown < 1:
        return False
    # A planner may show the rotation as it is while all tasks train, even if some end before.
    return plan.actions in (
        _generate(plan, [shown] * len(plan.htasks)),
        _generate(plan, plan.htask_steps(shown)),
    )


def _generate(plan: Plan, steps: Sequence[int]) -> list[list[Action]]:
    return build_schedule(
        plan.buckets,
        plan.microbatches,
        pp=plan.parallelism.pp,
        template=plan.template,
        steps=steps,
        instances=[htask.instance for htask in plan.htasks],
        co_scheduled=plan.orchestration.shares_clocks,
        carries=plan.carries,
        injection=plan.injection,
        in_flight=plan.in_flight,
    )


def _repeat(plan: Plan, iterations: int, steps: Sequence[int]) -> list[list[Action]]:
    shown = [0] * len(plan.htasks)
    for action in plan.actions[0]:
        if action.kind == "STEP":
            shown[action.htask] = max(shown[action.htask], action.number + 1)
    period = max(shown)
    for htask, (own, all_steps) in enumerate(zip(shown, plan.htask_steps(), strict=True)):
        if own != min(period, all_steps):
            expected = f"{min(period, all_steps)} steps of hTask {htask}, one per iteration"
            raise SpecError("plan: derived.schedule", f"{own} steps of hTask {htask}", expected)
    if iterations % period:
        raise SpecError("steps", iterations, f"a multiple of {period}, the iterations of the plan's schedule")
    m = plan.microbatches
    return [
        [
            Action(a.kind, a.htask, a.number + copy * period * (1 if a.kind == "STEP" else m[a.htask]))
            for copy in range(iterations // period)
            for a in stage
            if copy * period + _step_of(a, m) < steps[a.htask]
        ]
        for stage in plan.actions
    ]


def _step_of(action: Action, microbatches: Sequence[int]) -> int:
    return action.number if action.kind == "STEP" else action.number // microbatches[action.htask]
