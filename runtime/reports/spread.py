"""How far a task of a run may be from its solo run: twice as far as peft is from itself on the same data.

In float64 only the order of sums differs, and everything is within 1e-9. With fewer digits AdamW amplifies
the rounding of tiny gradients, the more the longer a task trains and the higher its rate. So peft trains the
task again on the same batches, with their sequences one by one and in another order: that changes rounding
alone, which is all that multiplexing may change.

The distance of two such trainings is a draw, whose scale is what we are after. At high rates, draws differ by
more than the factor that is allowed (``python -m benchmarks.spread``). A task that is beyond the bound of the
first draw is therefore judged by the largest of :data:`DRAWS`. A fault of ours that moves a task by more than
all of them is still told; what is not exact at all shows in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from muxtune.model import Dtype, ModelSpec
from muxtune.peft import PeftSpec

Agreement = Literal["within", "beyond", "undecided"]


@dataclass(frozen=True, slots=True)
class Distance:
    """Distance between two trainings of a task, or how far they may be apart."""

    loss: float
    """Largest relative difference of a step's loss."""
    update: float | None
    """Relative error of the adapter's update; None if it was not compared."""


TIMES = 2.0
"""Both are walks of independent roundings of one size; quotients of their distances scatter about 1."""

DRAWS = 3
"""Trainings of peft in other orders that a task is compared with before it counts as beyond its bound."""

STRICT = Distance(1e-9, 1e-9)
FLOORS: dict[Dtype, Distance] = {
    "float64": STRICT,
    "float32": Distance(1e-5, 1e-3),
    "bfloat16": Distance(2.0**-11, 2.0**-8),
}
"""What is allowed even if peft happens to meet itself."""

RELU_FLOOR = Distance(2e-3, 0.1)
"""Floor for ReLU in float32, of the backbone or of a bottleneck: a unit that rounding moves across zero makes
its gradient come or go, in one of many runs."""

CEILING = Distance(0.05, 0.5)
"""A bound beyond this allows anything: the comparison then decides nothing."""


def needs_spread(model: ModelSpec) -> bool:
    """Whether a second solo run says how far a task may be from the first."""
    return model.dtype != "float64"


def largest(distances: Sequence[Distance]) -> Distance:
    """The larger of each part; a NaN is larger than any number."""
    updates = [each.update for each in distances if each.update is not None]
    return Distance(_most([each.loss for each in distances]), _most(updates) if updates else None)


def bound_of(model: ModelSpec, peft: PeftSpec, spread: Distance | None) -> Distance:
    """How far a task may be from its solo run.

    Args:
        model: Backbone.
        peft: PEFT method of the task.
        spread: Distance of peft from itself; None in float64.
    """
    kinked = model.activation == "relu" or peft.kinked
    floor = RELU_FLOOR if kinked and model.dtype == "float32" else FLOORS[model.dtype]
    if spread is None:
        return floor
    update = None if spread.update is None else _most([floor.update or 0.0, TIMES * spread.update])
    return Distance(_most([floor.loss, TIMES * spread.loss]), update)


def judge(distance: Distance, bound: Distance) -> Agreement:
    """Whether a task is within its bound; ``undecided`` if the bound allows anything."""
    pairs = [(distance.loss, bound.loss, CEILING.loss)]
    if distance.update is not None and bound.update is not None:
        pairs.append((distance.update, bound.update, CEILING.update or 0.0))
    if not all(limit <= ceiling for _, limit, ceiling in pairs):  # nor may it be a NaN
        return "undecided"
    return "within" if all(found <= limit for found, limit, _ in pairs) else "beyond"


def _most(values: Sequence[float]) -> float:
    """Like ``max``, which may lose a NaN."""
    return float("nan") if any(map(math.isnan, values)) else max(values)
