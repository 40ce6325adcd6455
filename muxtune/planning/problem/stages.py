"""How the backbone is spread over ranks, and how many layers each pipeline stage gets."""

from __future__ import annotations

from collections.abc import Sequence

from muxtune.planning.decisions.options import PlanOptions
from muxtune.planning.decisions.structure import HTaskChoice, Mesh
from muxtune.planning.problem.problem import PlanningProblem
from muxtune.support.errors import SpecError


def choose_mesh(problem: PlanningProblem, htasks: Sequence[HTaskChoice], options: PlanOptions) -> Mesh:
    """The mesh that is asked for, with balanced layers; by default a pipeline over all ranks that are left.

    Raises:
        SpecError: More stages than layers, or more ranks than the cluster has.
    """
    tp, dp = options.tp or 1, options.dp or 1
    pp = options.pp or problem.cluster.ranks // (tp * dp)
    if not 1 <= tp * pp * dp <= problem.cluster.ranks:
        asked = f"{tp} * {pp} * {dp}"
        expected = f"at most {problem.cluster.ranks}, the ranks of {problem.cluster.name}"
        raise SpecError("--tp * --pp * --dp", asked, expected)
    return choose_layers(problem, htasks, pp, tp=tp, dp=dp)


def choose_layers(
    problem: PlanningProblem, htasks: Sequence[HTaskChoice], pp: int, *, tp: int = 1, dp: int = 1
) -> Mesh:
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
    loads = stage_loads(problem, htasks, Mesh(tuple(split), tp, dp))
    while True:
        busiest = max(range(pp), key=lambda stage: loads[stage])
        idlest = min(range(pp), key=lambda stage: loads[stage])
        if split[busiest] == 1:
            return Mesh(tuple(split), tp, dp)
        moved = list(split)
        moved[busiest] -= 1
        moved[idlest] += 1
        moved_loads = stage_loads(problem, htasks, Mesh(tuple(moved), tp, dp))
        if max(moved_loads) >= max(loads):
            return Mesh(tuple(split), tp, dp)
        split, loads = moved, moved_loads


def stage_loads(problem: PlanningProblem, htasks: Sequence[HTaskChoice], mesh: Mesh) -> list[float]:
    """Seconds of work per stage in one iteration."""
    prices = [(htask, problem.htask_times(htask, mesh)) for htask in htasks]
    return [
        sum(h.shape.microbatches * (t.fwd_s[stage] + t.bwd_s[stage]) for h, t in prices)
        for stage in range(mesh.pp)
    ]
