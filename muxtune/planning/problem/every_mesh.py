"""What a policy would do on every mesh that may be worth it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from muxtune.planning.decisions.options import PlanOptions
from muxtune.planning.decisions.structure import PlanStructure
from muxtune.planning.problem.assemble import structure_iteration_s
from muxtune.planning.problem.memory_limit import MemoryLimit
from muxtune.planning.problem.mesh_bounds import MeshBounds
from muxtune.planning.problem.meshes import MeshShape, candidate_meshes
from muxtune.planning.problem.problem import PlanningProblem
from muxtune.schedule import lower_bound_s


def on_every_mesh(
    problem: PlanningProblem,
    options: PlanOptions,
    build: Callable[[PlanOptions], Sequence[PlanStructure]],
    leaner: Callable[[PlanOptions], Sequence[PlanStructure]] | None = None,
) -> list[PlanStructure]:
    """What a policy would do on each mesh of :func:`candidate_meshes`, as far as it fits the memory.

    So every policy gets the mesh that is best for its own structure, and leaves ranks idle where that is
    faster. A mesh with idle ranks is left out where the work that was seen takes longer there than the best
    iteration so far (:class:`muxtune.planning.problem.mesh_bounds.MeshBounds`).

    Args:
        problem: The planning problem.
        options: Decisions that are taken away from the policy.
        build: Structures for options with a fixed mesh; they may exceed the memory.
        leaner: Further ones, for meshes where none of these fits.

    Raises:
        SpecError: No structure fits, on no mesh.
    """
    shapes = candidate_meshes(problem.model, problem.cluster, options, idle=True)
    limit, bounds = MemoryLimit(problem), MeshBounds(problem)
    found: list[PlanStructure] = []
    best_s = math.inf

    def look_at(shape: MeshShape) -> None:
        nonlocal best_s
        built = build(replace(options, **shape._asdict()))
        bounds.see(built)
        fit = limit.fitting(built)
        if not fit and leaner is not None:
            fit = limit.fitting(leaner(replace(options, **shape._asdict())))
        for structure in fit:
            if lower_bound_s(problem.times(structure), structure.microbatches) < best_s:
                best_s = min(best_s, structure_iteration_s(problem, structure))
        found.extend(fit)

    first = {shape for shape in shapes if shape.ranks == shapes[0].ranks or _is_long(shape, shapes)}
    for shape in sorted(first, key=lambda shape: (not _is_long(shape, shapes), -shape.ranks, shape)):
        if not found or math.isfinite(bounds.least_s(shape)):
            look_at(shape)
    left = [shape for shape in shapes if shape not in first]
    while left:
        shape = min(left, key=bounds.least_s)
        if options.objective == "iteration" and bounds.least_s(shape) >= best_s:
            break
        left.remove(shape)
        look_at(shape)
    if not found:
        limit.refuse()
    return found


def _is_long(shape: MeshShape, shapes: Sequence[MeshShape]) -> bool:
    """Whether a mesh has as few replicas as there may be, and then as many stages: its work is the least."""
    alike = [each for each in shapes if each.tp == shape.tp]
    return shape == min(alike, key=lambda each: (each.dp, -each.pp))
