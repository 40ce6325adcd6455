"""How many layers each pipeline stage gets."""

from __future__ import annotations

from collections.abc import Sequence

from muxtune.errors import SpecError
from muxtune.planning.problem import PlanningProblem
from muxtune.planning.structure import HTaskChoice


def choose_layers(problem: PlanningProblem, htasks: Sequence[HTaskChoice], pp: int) -> tuple[int, ...]:
    """Layers per stage with the least work on the busiest stage.

    Starts from an even split and moves one layer at a time from the busiest stage to the idlest while that
    helps; layers are alike, so no better split is missed by moving single layers.

    Raises:
        SpecError: There are fewer layers than stages.
    """
    layers = problem.model.layers
    if pp > layers:
        raise SpecError("parallelism.pp", pp, f"at most {layers}, the layers of {problem.model.name}")
    split = [layers // pp + (stage < layers % pp) for stage in range(pp)]
    loads = stage_loads(problem, htasks, tuple(split))
    while True:
        busiest = max(range(pp), key=lambda stage: loads[stage])
        idlest = min(range(pp), key=lambda stage: loads[stage])
        if split[busiest] == 1:
            return tuple(split)
        moved = list(split)
        moved[busiest] -= 1
        moved[idlest] += 1
        moved_loads = stage_loads(problem, htasks, tuple(moved))
        if max(moved_loads) >= max(loads):
            return tuple(split)
        split, loads = moved, moved_loads


def stage_loads(
    problem: PlanningProblem, htasks: Sequence[HTaskChoice], layers_per_stage: tuple[int, ...]
) -> list[float]:
    """Seconds of work per stage in one iteration."""
    prices = [(htask, problem.htask_times(htask, layers_per_stage)) for htask in htasks]
    return [
        sum(h.shape.microbatches * (t.fwd_s[stage] + t.bwd_s[stage]) for h, t in prices)
        for stage in range(len(layers_per_stage))
    ]
