"""The ways to spread a backbone over a cluster's ranks, and how many layers each stage gets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from muxtune.cluster import ClusterSpec
from muxtune.model import ModelSpec, sharding_obstacle
from muxtune.placement import Placement
from muxtune.planning.decisions.options import PlanOptions
from muxtune.planning.decisions.structure import HTaskChoice, Mesh
from muxtune.planning.problem.problem import PlanningProblem
from muxtune.support.errors import SpecError


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
    one layer. Ranks are taken in their order, so those of a mesh fill node after node, and a mesh that fits
    into one is in one. On CPUs only pipelines are proposed, unless ``--tp`` or ``--dp`` asks for more: they
    alone were held against real runs. Where the options name meshes, these stand in for all others.

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
    looked_at = [MeshShape(tp, pp, dp) for tp in tps for pp in pps for dp in dps]
    if options.meshes is not None:
        looked_at = [MeshShape(*mesh) for mesh in dict.fromkeys(options.meshes)]
    shapes = [shape for shape in looked_at if _may_be(shape, model, cluster)]
    refused = None
    if options.meshes is not None:
        fixed = (options.tp, options.pp, options.dp)
        refused = next((shape for shape in looked_at if shape not in shapes), None)
        shapes = [shape for shape in shapes if _agrees(shape, fixed)]
    if not shapes or refused is not None:
        asked = ", ".join(
            f"--{name} {value}"
            for name, value in (("tp", options.tp), ("pp", options.pp), ("dp", options.dp))
            if value is not None
        )
        if options.meshes is not None:
            asked = str(refused) if refused else f"{asked or 'one'} of {len(options.meshes)} meshes"
        expected = (
            f"at most {ranks} ranks in all, tp a divisor of {model.heads} heads and of the "
            f"{cluster.devices_per_node} ranks of a node, and a divisor or multiple of {model.kv_heads} key "
            f"and value heads, pp at most {model.layers} layers"
        )
        raise SpecError("mesh", asked, expected)
    shapes.sort(key=lambda shape: (-shape.ranks, shape))
    return [shape for shape in shapes if idle or shape.ranks == shapes[0].ranks]


def _allowed(fixed: int | None, most: int) -> Sequence[int]:
    return range(1, most + 1) if fixed is None else (fixed,)


def _may_be(shape: MeshShape, model: ModelSpec, cluster: ClusterSpec) -> bool:
    tp, pp, per_node = shape.tp, shape.pp, cluster.devices_per_node
    return (
        min(shape) >= 1
        and shape.ranks <= cluster.ranks
        and pp <= model.layers
        and sharding_obstacle(model, tp) is None
        and (shape.ranks <= per_node or not per_node % tp)
    )


def _agrees(mesh: Sequence[int], fixed: Sequence[int | None]) -> bool:
    return all(asked in {None, own} for own, asked in zip(mesh, fixed, strict=True))


def balanced_layers(layers: int, pp: int, layer_s: float, first_s: float, last_s: float) -> tuple[int, ...]:
    """Layers per stage with the least work on the busiest stage, as evenly as that allows.

    Args:
        layers: Layers of the backbone, at least ``pp``.
        pp: Pipeline stages.
        layer_s: Work of a layer in an iteration.
        first_s: Further work of the first stage; may be negative.
        last_s: Further work of the last stage.
    """
    if pp == 1:
        return (layers,)
    split = [1] * pp
    extra_s = [first_s] + [0.0] * (pp - 2) + [last_s]
    for _ in range(layers - pp):  # each goes where it makes the least maximum; layers are alike
        split[min(range(pp), key=lambda s: (split[s] + 1) * layer_s + extra_s[s])] += 1
    return tuple(split)


def mesh_of(shape: MeshShape, layers: tuple[int, ...]) -> Mesh:
    """The shape with its layers dealt out."""
    return Mesh(layers, shape.tp, shape.dp)


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
    """The mesh with :func:`balanced_layers` for some hTasks, by exact prices.

    Raises:
        SpecError: There are fewer layers than stages.
    """
    layers = problem.model.layers
    if pp > layers:
        raise SpecError("parallelism.pp", pp, f"at most {layers}, the layers of {problem.model.name}")
    shape = MeshShape(tp, pp, dp)
    even = mesh_of(shape, balanced_layers(layers, pp, 1.0, 0.0, 0.0))
    if pp == 1:
        return even
    layer_s = first_s = last_s = 0.0
    for htask in htasks:
        m, (own_first_s, own_last_s) = htask.shape.microbatches, problem.end_seconds(htask, even)
        layer_s += m * problem.layer_seconds(htask, even)
        first_s += m * own_first_s
        last_s += m * own_last_s
    return mesh_of(shape, balanced_layers(layers, pp, layer_s, first_s, last_s))
