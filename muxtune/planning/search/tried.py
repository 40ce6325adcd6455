"""What a search has played, and the one place where candidates are compared."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeVar

from muxtune.planning.decisions.structure import PlanStructure
from muxtune.planning.problem.objectives import Objective, find_objective
from muxtune.planning.problem.problem import PlanningProblem

Valued = tuple[float, PlanStructure]
"""A structure after its value; less is better."""

Key = TypeVar("Key", bound=Hashable)


class Tried:
    """Values candidates by an objective, and remembers them for whoever asks what else there was.

    Args:
        problem: The planning problem.
        objective: What is compared; by default the time of an iteration.
    """

    def __init__(self, problem: PlanningProblem, objective: Objective | None = None) -> None:
        self._problem = problem
        self._objective = objective or find_objective("iteration")
        self._values: dict[PlanStructure, float] = {}

    def value(self, structure: PlanStructure) -> float:
        """Value of a candidate."""
        value = self._values.get(structure)
        if value is None:
            value = self._values[structure] = self._objective.score(self._problem, structure)
        return value

    def best_first(self) -> list[Valued]:
        """All candidates, whether they fit the memory or not; of equal ones the first that was tried."""
        return sorted(((value, structure) for structure, value in self._values.items()), key=value_of)


def value_of(valued: Valued) -> float:
    """Key by which candidates are sorted."""
    return valued[0]


def best_of_each(ordered: list[Valued], kind: Callable[[PlanStructure], Key | None]) -> dict[Key, Valued]:
    """The best candidate of every kind, in the order of their values.

    Args:
        ordered: Candidates, the best first.
        kind: Kind of a candidate; None for those that do not matter.
    """
    found: dict[Key, Valued] = {}
    for valued in ordered:
        key = kind(valued[1])
        if key is not None:
            found.setdefault(key, valued)
    return found
