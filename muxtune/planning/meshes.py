"""The ways to spread a backbone over a cluster's ranks: tensor, pipeline and data parallelism."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from muxtune.cluster import ClusterSpec
from muxtune.errors import SpecError
from muxtune.model import ModelSpec, sharding_obstacle
from muxtune.placement import Placement
from muxtune.planning.limits import fitting
from muxtune.planning.options import PlanOptions
from muxtune.planning.problem import PlanningProblem
from muxtune.planning.structure import PlanStructure


class MeshShape(NamedTuple):
    """A mesh before its layers are dealt out."""

    tp: int
    """Ranks that share a stage."""
    pp: int
    """Pipeline stages."""
    dp: int
    """Replicas that share the data."""

    @property
    def ranks(self) -> int:
        """Devices that it takes."""
        return self.tp * self.pp * self.dp

    def on(self, cluster: ClusterSpec) -> Placement:
        """Where its ranks stand on a cluster."""
        return Placement(self.tp, self.pp, self.dp, cluster.devices_per_node)

    def __str__(self) -> str:
        return f"tp {self.tp}, pp {self.pp}, dp {self.dp}"


def candidate_meshes(
    model: ModelSpec, cluster: ClusterSpec, options: PlanOptions, *, idle: bool = False
) -> list[MeshShape]:
    """Meshes that the backbone can be spread over, those with most ranks first.

    Tensor-parallel ranks share a node, and each has whole heads, of keys and values too; a stage has at least
    one layer. On CPUs only pipelines are proposed, unless ``--tp`` or ``--dp`` asks for more: they alone were
    held against real runs.

    Args:
        model: The backbone.
        cluster: Where it is spread.
        options: What is fixed; the others take what ranks are left.
        idle: Also meshes that leave more ranks idle than others do.

    Raises:
        SpecError: No mesh is as the options want it.
    """
    ranks = cluster.ranks
    pipelines_only = cluster.device.kind == "cpu"
    tps = _allowed(options.tp, 1 if pipelines_only else cluster.devices_per_node)
    dps = _allowed(options.dp, 1 if pipelines_only else ranks)
    pps = _allowed(options.pp, min(ranks, model.layers))
    shapes = [
        MeshShape(tp, pp, dp)
        for tp in tps
        for pp in pps
        for dp in dps
        if tp * pp * dp <= ranks
        and pp <= model.layers
        and sharding_obstacle(model, tp) is None
        and not cluster.devices_per_node % tp
    ]
    if not shapes:
        asked = ", ".join(
            f"--{name} {value}"
            for name, value in (("tp", options.tp), ("pp", options.pp), ("dp", options.dp))
            if value is not None
        )
        expected = (
            f"at most {ranks} ranks in all, tp a divisor of {model.heads} heads and of the "
            f"{cluster.devices_per_node} ranks of a node, and a divisor or multiple of {model.kv_heads} key "
            f"and value heads, pp at most {model.layers} layers"
        )
        raise SpecError("mesh", asked, expected)
    shapes.sort(key=lambda shape: (-shape.ranks, shape))
    return [shape for shape in shapes if idle or shape.ranks == shapes[0].ranks]


def on_every_mesh(
    problem: PlanningProblem,
    options: PlanOptions,
    build: Callable[[PlanOptions], Sequence[PlanStructure]],
) -> list[PlanStructure]:
    """What a policy would do on each mesh of :func:`candidate_meshes`, as far as it fits the memory.

    So every policy gets the mesh that is best for its own structure.

    Args:
        problem: What is planned.
        options: Decisions that are taken away from the policy.
        build: Structures for options with a fixed mesh; they may exceed the memory.

    Raises:
        SpecError: No structure fits, on no mesh.
    """
    structures: list[PlanStructure] = []
    for shape in candidate_meshes(problem.model, problem.cluster, options):
        structures += build(replace(options, **shape._asdict()))
    return fitting(problem, structures)


def _allowed(fixed: int | None, most: int) -> Sequence[int]:
    return range(1, most + 1) if fixed is None else (fixed,)
