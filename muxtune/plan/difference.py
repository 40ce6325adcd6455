"""What two plans decide differently, and what is predicted of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from pydantic import BaseModel, ConfigDict

from muxtune.plan.plan import Plan
from muxtune.plan.predicted import Predicted

_STRICT = ConfigDict(frozen=True, extra="forbid")


class DecisionDifference(BaseModel):
    """A decision that only one of two plans has, or that they have with other values."""

    model_config = _STRICT

    field: str
    """Path of the decision; tasks are named by their ids, hTasks by their positions."""
    first: object
    """Value in the first plan; null where it has no such decision."""
    second: object
    """Value in the second plan."""


class PlanDifference(BaseModel):
    """What ``muxtune plan diff --json`` prints."""

    model_config = _STRICT

    decisions: tuple[DecisionDifference, ...]
    """Empty where both decide the same."""
    first: Predicted
    """Prediction for the first plan."""
    second: Predicted
    """Prediction for the second plan."""


def compare_plans(first: Plan, second: Plan) -> PlanDifference:
    """Decisions that differ, and both predictions."""
    here, there = _decided(first), _decided(second)
    return PlanDifference(
        decisions=tuple(
            DecisionDifference(field=field, first=here.get(field), second=there.get(field))
            for field in [*here, *(field for field in there if field not in here)]
            if field not in here or field not in there or here[field] != there[field]
        ),
        first=first.predicted,
        second=second.predicted,
    )


def _decided(plan: Plan) -> dict[str, object]:
    """Decisions by their paths."""
    content = plan.decisions.model_dump(mode="json")
    content["tasks"] = {task.pop("id"): task for task in content["tasks"]}
    return dict(_leaves(content, ""))


def _leaves(value: object, path: str) -> Iterator[tuple[str, object]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, Sequence) and any(isinstance(inner, Mapping) for inner in value):
        for position, inner in enumerate(value):
            yield from _leaves(inner, f"{path}[{position}]")
    else:
        yield path, value
