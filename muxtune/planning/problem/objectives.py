"""What plans are compared by: the time of an iteration, or something else that is to be small."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from muxtune.batches import effective_tokens
from muxtune.planning.decisions.options import ObjectiveOption
from muxtune.planning.decisions.structure import PlanStructure
from muxtune.planning.problem.assemble import structure_iteration_s, structure_schedule
from muxtune.planning.problem.problem import PlanningProblem
from muxtune.support.errors import SpecError
from muxtune.support.registry import PluginError, raised
from muxtune.support.user_code import is_from_file, object_from_file

Score = Callable[[PlanningProblem, PlanStructure], float]
"""A number that is smaller for what is better; of equal ones the first counts."""


@dataclass(frozen=True, slots=True)
class Objective:
    """What a search makes small."""

    name: str
    """As the plan records it."""
    score: Score

    @property
    def is_iteration(self) -> bool:
        """Whether it is the time of an iteration, which bounds and estimates are of."""
        return self.name == "iteration"


def peak_bytes(problem: PlanningProblem, structure: PlanStructure) -> float:
    """Peak memory of the fullest stage in bytes; of equal ones the faster is smaller, by a part of a byte."""
    stages = problem.memory(structure, structure_schedule(structure))
    iteration_s = structure_iteration_s(problem, structure)
    return max(stage.total_bytes for stage in stages) + iteration_s / (1.0 + iteration_s)


def makespan_s(problem: PlanningProblem, structure: PlanStructure) -> float:
    """Seconds until the last task has done its last step."""
    return max(_ends_s(problem, structure).values())


def slowest_tenant_s_per_token(problem: PlanningProblem, structure: PlanStructure) -> float:
    """Seconds until a task's last step per token of its examples, for the task with the most.

    Where all tasks have as many steps, what is best is what has the shortest iteration.
    """
    ends_s = _ends_s(problem, structure)
    return max(
        ends_s[data.task.steps] / (data.task.steps * effective_tokens([data]))
        for data in problem.data.values()
    )


def _ends_s(problem: PlanningProblem, structure: PlanStructure) -> dict[int, float]:
    """Seconds until so many steps are done, for every task's number of steps.

    hTasks leave when their longest task ends, and the others go on faster.
    """
    steps = {task.id: task.steps for task in problem.tasks}
    last = [max(steps[task_id] for task_id in htask.task_ids) for htask in structure.htasks]
    ends_s: dict[int, float] = {}
    done, elapsed_s = 0, 0.0
    for until in sorted(set(steps.values())):
        running = [h for h, own in enumerate(last) if own > done]
        elapsed_s += (until - done) * structure_iteration_s(problem, _only(structure, running))
        done, ends_s[until] = until, elapsed_s
    return ends_s


def _only(structure: PlanStructure, kept: list[int]) -> PlanStructure:
    """The structure with some of its hTasks."""
    if len(kept) == len(structure.htasks):
        return structure
    place = {h: position for position, h in enumerate(kept)}
    buckets = (tuple(place[h] for h in bucket if h in place) for bucket in structure.buckets)
    return replace(
        structure,
        htasks=tuple(structure.htasks[h] for h in kept),
        buckets=tuple(bucket for bucket in buckets if bucket),
        injection=tuple(place[h] for h in structure.injection if h in place),
    )


_OBJECTIVES: Mapping[str, Score] = {
    "iteration": structure_iteration_s,
    "memory": peak_bytes,
    "makespan": makespan_s,
    "slowest-tenant": slowest_tenant_s_per_token,
}


def find_objective(option: ObjectiveOption) -> Objective:
    """An objective by its name, one of a file as ``FILE.py:FUNCTION``, or a function of one's own.

    Raises:
        UserError: There is no such objective.
    """
    if isinstance(option, str) and is_from_file(option):
        found = object_from_file(option, "--objective", callable, "a function of problem and structure")
        if not callable(found):
            raise SpecError("--objective", option, "a function of problem and structure")
        option = found
    if callable(option):
        name = getattr(option, "__name__", type(option).__name__)
        if name in _OBJECTIVES:  # plans record the name
            raise SpecError("--objective", option, f"a function of another name: {name} is one of ours")
        return Objective(name, _checked(option, name))
    if option not in _OBJECTIVES:
        expected = f"{', '.join(_OBJECTIVES)}, FILE.py:FUNCTION, or in Python a function"
        raise SpecError("--objective", option, expected)
    return Objective(option, _OBJECTIVES[option])


def _checked(score: Callable[..., float], name: str) -> Score:
    """A function of somebody's own, whose faults are named as its own."""

    def checked(problem: PlanningProblem, structure: PlanStructure) -> float:
        try:
            found = float(score(problem, structure))
        except Exception as error:
            raise PluginError(f"the objective {name!r}: it raised {raised(error)}") from error
        if not math.isfinite(found):
            raise PluginError(f"the objective {name!r}: it returned {found}: expected a finite number")
        return found

    return checked
