"""About what an iteration takes at least on a mesh on which nothing is built yet.

What a policy does in a layer depends on the mesh only through its ranks per stage: longer pipelines have no
other work, and more replicas cut steps into smaller parts. So the work that was seen on other meshes bounds
an iteration on this one. With ``W`` seconds of an hTask's micro-batches in a layer of all replicas, ``m``
micro-batches on each, ``L`` layers, at least ``l`` of them on the stage that has most, and ``dp`` replicas:

load    sum of W / dp * l                  a stage does one action at a time
chain   W / dp * (l + (L - l) / m)         an hTask's first micro-batch passes the others' stages, too
taking turns, instances drain one by one: sum of the chains
drained, a step ends as it begins: load, and the shortest way through the other stages
one by one (lorapp), each micro-batch waits for the one before it: W / dp * L
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from muxtune.memory import Sharding, backbone_bytes
from muxtune.planning.decisions.structure import PlanStructure
from muxtune.planning.exact.seconds import overlaps
from muxtune.planning.problem.meshes import MeshShape
from muxtune.planning.problem.problem import PlanningProblem
from muxtune.schedule import Template


@dataclass(frozen=True, slots=True)
class _Kind:
    """What structures have in common whose work is compared."""

    tp: int
    groups: tuple[tuple[tuple[str, ...], int], ...]
    """Tasks and micro-batches per carry group of every hTask."""
    turns: bool
    """Whether every hTask has an instance of its own."""
    template: Template


@dataclass(slots=True)
class _Seen:
    """Work of every hTask in a layer, and its micro-batches."""

    work_s: dict[int, list[float]]
    """By replicas, the least of all of them together; more that divide these replicas again have no less."""
    microbatches: dict[int, list[int]]
    """By replicas, the most micro-batches of all of them; more replicas only round them up."""


class MeshBounds:
    """Remembers the work of what was built, for meshes that are still to be built on.

    Args:
        problem: The planning problem.
    """

    def __init__(self, problem: PlanningProblem) -> None:
        self._problem = problem
        self._seen: dict[_Kind, _Seen] = {}
        self._instances = 0
        """Fewest copies of the backbone; 0 before anything was seen."""

    def see(self, structures: Iterable[PlanStructure]) -> None:
        """Remember the work of structures, which need not fit the memory."""
        distinct = {(each.htasks, each.template, each.orchestration): each for each in structures}
        for structure in distinct.values():
            self._see(structure)

    def _see(self, structure: PlanStructure) -> None:
        mesh, htasks = structure.mesh, structure.htasks
        kind = _Kind(
            mesh.tp,
            tuple((htask.task_ids, htask.shape.carry) for htask in htasks),
            len({htask.instance for htask in htasks}) == len(htasks),
            structure.template,
        )
        work_s = layer_seconds(self._problem, structure)
        microbatches = [htask.shape.microbatches * mesh.dp for htask in htasks]
        known = self._seen.setdefault(kind, _Seen({}, {}))
        least_s = known.work_s.setdefault(mesh.dp, work_s)
        known.work_s[mesh.dp] = [min(pair) for pair in zip(least_s, work_s, strict=True)]
        most = known.microbatches.setdefault(mesh.dp, microbatches)
        known.microbatches[mesh.dp] = [max(pair) for pair in zip(most, microbatches, strict=True)]
        instances = len({htask.instance for htask in htasks})
        self._instances = min(instances, self._instances or instances)

    def least_s(self, shape: MeshShape) -> float:
        """Bound for the best of what was seen with as many ranks per stage, on a divisor of the replicas.

        0 if there is nothing.

        Infinite where the copies of the backbone alone exceed the memory.
        """
        if not self._holds_backbones(shape):
            return math.inf
        alike = [(kind, seen) for kind, seen in self._seen.items() if kind.tp == shape.tp]
        return self._problem.settings.least_work * min(
            (self._bound_s(*each, shape) for each in alike), default=0.0
        )

    def _holds_backbones(self, shape: MeshShape) -> bool:
        model = self._problem.model
        most, sharding = -(-model.layers // shape.pp), Sharding(tp=shape.tp)
        bytes_ = backbone_bytes(model, most, first=False, last=False, sharding=sharding)
        return self._instances * bytes_ <= self._problem.cluster.device.memory_bytes

    def _bound_s(self, kind: _Kind, seen: _Seen, shape: MeshShape) -> float:
        layers: int = self._problem.model.layers
        most: int = -(-layers // shape.pp)
        divided = [work_s for dp, work_s in seen.work_s.items() if shape.dp % dp == 0]
        if not divided:
            return 0.0
        work_s: list[float] = [min(each) / shape.dp for each in zip(*divided, strict=True)]
        counts: list[int] = [min(each) for each in zip(*seen.microbatches.values(), strict=True)]
        others_s: list[float] = [  # of a micro-batch, in the layers of all other stages
            float(layers - most) * own_s / -(-count // shape.dp)
            for own_s, count in zip(work_s, counts, strict=True)
        ]
        load_s: float = most * sum(work_s)
        if kind.turns:
            return load_s + sum(others_s)
        if kind.template in {"flush", "gpipe"}:
            return load_s + min(others_s)
        if kind.template == "lorapp":
            return max(load_s, layers * max(work_s))
        chains_s = (most * own_s + other_s for own_s, other_s in zip(work_s, others_s, strict=True))
        return max(load_s, *chains_s)


def layer_seconds(problem: PlanningProblem, structure: PlanStructure) -> list[float]:
    """Work of every hTask in a layer in an iteration, of all replicas, without what a stage has beside."""
    mesh = structure.mesh
    share = problem.settings.hidden if overlaps(mesh, structure.orchestration) else 1.0
    return [
        share * mesh.dp * htask.shape.microbatches * problem.layer_seconds(htask, mesh)
        for htask in structure.htasks
    ]


def least_iteration_s(layer_work_s: float, shape: MeshShape, layers: int) -> float:
    """About what an iteration on a mesh takes at least: a stage has as many layers as the mean, rounded up.

    Args:
        layer_work_s: Least work seen in a layer in an iteration, of all replicas.
        shape: Shape of the mesh.
        layers: Layers of the backbone.
    """
    return layer_work_s * -(-layers // shape.pp) / shape.dp
