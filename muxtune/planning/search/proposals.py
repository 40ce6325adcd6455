"""The partitions of a mesh that are worth a look, by estimate: for every number of hTasks, and every pace."""

# Shapes, in names in lower case: n tasks, W widest group, S stages, K kinds of stages, P partitions,
# H hTasks of a partition

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from muxtune.peft import count_layers, stage_layers
from muxtune.planning.decisions.partition_dp import Places, cheapest_cuts, paced_cuts
from muxtune.planning.decisions.settings import SearchSettings
from muxtune.planning.decisions.structure import HTaskChoice, Mesh
from muxtune.planning.estimate.curves import Floats
from muxtune.planning.estimate.group_seconds import GroupBands, GroupPrices, group_steps_s
from muxtune.planning.estimate.memory_bound import Room, room_for_groups
from muxtune.planning.exact.bounds import partition_bounds
from muxtune.planning.exact.seconds import StageKind
from muxtune.planning.problem.carrying import cut_choice
from muxtune.planning.problem.layouts import cheapest_choice
from muxtune.planning.problem.meshes import MeshShape, balanced_layers, mesh_of
from muxtune.planning.problem.problem import PlanningProblem
from muxtune.schedule import Template


@dataclass(frozen=True)
class Proposal:
    """A partition on a mesh, not yet priced exactly."""

    bands: GroupBands
    mesh: Mesh
    layout_h: tuple[int, ...]
    runner_up_h: tuple[int, ...]
    """Layouts that may be as cheap, or the same again."""
    places: Places
    bound_s: float
    """Seconds that no schedule goes below, if the estimated prices are right."""
    load_s: float
    """Seconds of work of the busiest stage, of which nothing is gone if micro-batches are cut."""
    layer_work_s: float
    """Seconds of a layer of a replica in an iteration, with as much overlap as expected."""
    expected_s: float
    """Rough guess at the iteration, by which partitions stand in line."""
    least_share: float
    """Lower bound with all communication, or all computation, of a stage hidden, over ``bound_s``."""
    needed_bytes: float
    """Bytes that surely suffice on the stage with least room, by estimate."""
    has_room: bool
    """Whether it surely fits the memory, by estimate; others come last."""

    @property
    def count(self) -> int:
        """Number of hTasks."""
        return len(self.layout_h)

    def groups(self) -> list[tuple[str, ...]]:
        """Task ids of the hTasks."""
        return self.bands.members(self.places)

    def htasks(self, problem: PlanningProblem, *, alternatives: bool = False) -> list[HTaskChoice]:
        """Choices with exact shapes.

        Args:
            problem: The planning problem.
            alternatives: Whether exact prices decide between alignments that are estimated to cost the same.
        """
        found = []
        for task_ids, *layouts in zip(self.groups(), self.layout_h, self.runner_up_h, strict=True):
            possible = [
                self._choice(problem, task_ids, layout)
                for layout in dict.fromkeys(layouts if alternatives else layouts[:1])
            ]
            found.append(possible[0] if len(possible) == 1 else cheapest_choice(problem, self.mesh, possible))
        return found

    def shortest_htasks(self, problem: PlanningProblem) -> list[HTaskChoice]:
        """Choices with exact shapes, each in its shortest layout; carry groups stay as they are."""
        found = []
        for task_ids, layout in zip(self.groups(), self.layout_h, strict=True):
            carry = self.bands.layouts[layout].carry
            alike = [number for number, each in enumerate(self.bands.layouts) if each.carry == carry]
            numbers = dict.fromkeys([layout, *alike])  # of equal ones the one that is fastest by estimate
            possible = [self._choice(problem, task_ids, number) for number in numbers]
            found.append(min(possible, key=lambda choice: choice.shape.tokens))
        return found

    def _choice(self, problem: PlanningProblem, task_ids: tuple[str, ...], number: int) -> HTaskChoice:
        layout = self.bands.layouts[number]
        if layout.carry > self.bands.carry:
            return cut_choice(problem, self.mesh, task_ids, layout.carry)
        shape = problem.shape(task_ids, *layout, dp=self.mesh.dp)
        return HTaskChoice(task_ids=task_ids, shape=shape)


@dataclass(frozen=True)
class MeshProposals:
    """Partitions on one mesh."""

    shape: MeshShape
    mesh: Mesh
    """Mesh with layers balanced for the tasks one by one."""
    proposals: tuple[Proposal, ...]
    """None if the memory has no room for any."""
    layer_work_s: float
    """Least work of any partition in an iteration, in a layer of all replicas; infinite if none is known."""


def propose_on_mesh(
    bands: GroupBands, prices: GroupPrices, shape: MeshShape, templates: Sequence[Template]
) -> MeshProposals:
    """Deal out the layers, cut the tasks into groups, and estimate iterations.

    Layers are balanced for the tasks one by one, then for the best partition, if that says otherwise.
    """
    model = bands.problem.model
    mesh = mesh_of(
        shape, balanced_layers(model.layers, shape.pp, *loads_s(bands, prices, shape, bands.alone))
    )
    proposals = _proposals(bands, prices, mesh, templates)
    if proposals and shape.pp > 1:
        best = min(proposals, key=lambda each: each.expected_s)
        loads = loads_s(bands, prices, shape, best.places)
        rebalanced = mesh_of(shape, balanced_layers(model.layers, shape.pp, *loads))
        if rebalanced != mesh:
            proposals += _proposals(bands, prices, rebalanced, templates)
    layer_work_s = shape.dp * min((each.layer_work_s for each in proposals), default=np.inf)
    return MeshProposals(shape, mesh, tuple(proposals), layer_work_s)


def loads_s(
    bands: GroupBands, prices: GroupPrices, shape: MeshShape, places: Places
) -> tuple[float, float, float]:
    """Work of a layer in an iteration, and what the first and the last stage have beside their layers."""
    m = prices.microbatches_nw[places]
    placement = shape.on(bands.problem.cluster)
    replicas = {route for stage in range(shape.pp) for route in placement.replica_routes(stage)}
    # Where layers differ in what is attached, those of a mean one count.
    model = bands.problem.model
    layers = stage_layers(model, tuple(bands.pefts), 0, model.layers)
    runs, share = (layers, 1 / model.layers) if len(layers) > 1 else (((layers[0][0], 1),), 1.0)
    middle = StageKind(runs, False, False, tuple(sorted(replicas)))
    steps_s = share * group_steps_s(bands, middle, shape.tp)[places]
    layer_s = float((m * prices.layer_s_nw[places] + steps_s).sum())
    message_s = m * prices.message_s_nw[places]  # the stages at the ends have one neighbour less
    first_s = m * prices.first_s_nw[places] - message_s
    last_s = m * prices.last_s_nw[places] - message_s
    return layer_s, float(first_s.sum()), float(last_s.sum())


def stage_work_s(bands: GroupBands, prices: GroupPrices, mesh: Mesh) -> list[Floats]:
    """Forward and backward of a micro-batch of every group on every stage: ``[S]`` of ``[n, W]``.

    Stages that are alike share an array.
    """
    known: dict[StageKind, Floats] = {}
    kinds = bands.problem.stage_kinds(mesh)
    for kind in dict.fromkeys(kinds):
        work_s = count_layers(kind.layers) * prices.layer_s_nw + prices.action_s_nw
        work_s += group_steps_s(bands, kind, mesh.tp) / prices.microbatches_nw
        work_s += ((not kind.first) + (not kind.last)) * prices.message_s_nw
        work_s += kind.first * prices.first_s_nw + kind.last * prices.last_s_nw
        known[kind] = work_s
    return [known[kind] for kind in kinds]


def _proposals(
    bands: GroupBands, prices: GroupPrices, mesh: Mesh, templates: Sequence[Template]
) -> list[Proposal]:
    work_s = stage_work_s(bands, prices, mesh)
    slowest_s = np.max(list({id(each): each for each in work_s}.values()), axis=0)
    microbatches = prices.microbatches_nw.astype(np.float64)
    room = room_for_groups(bands, prices, mesh)
    possible_nw, safe_nw = room.possible_nw, room.safe_nw
    masks = [possible_nw] if np.array_equal(possible_nw, safe_nw) else [possible_nw, safe_nw]
    distinct: dict[tuple[bytes, bytes], Places] = {}
    for mask in masks:
        slot_s = np.where(mask, slowest_s, np.inf)
        for places in _all_cuts(slot_s, microbatches, mesh.pp, bands.problem.settings):
            distinct.setdefault((places[0].tobytes(), places[1].tobytes()), places)
    return make_proposals(bands, prices, room, mesh, templates, work_s, list(distinct.values()))


def _all_cuts(slot_s_nw: Floats, microbatches_nw: Floats, pp: int, settings: SearchSettings) -> list[Places]:
    """Cuts into groups: one for every number of groups and, in a pipeline, for every pace."""
    n = len(slot_s_nw)
    cuts = cheapest_cuts(microbatches_nw * slot_s_nw, min(n, settings.most_counts), settings.give_up)
    counts = np.flatnonzero(np.isfinite(cuts.total)).tolist()
    found = [cuts.places(groups) for groups in counts]
    if pp == 1 or not settings.paces:
        return found
    finite = np.where(np.isfinite(slot_s_nw), slot_s_nw, 0.0)
    slowest_alone_s, slowest_s = float(finite[:, 0].max()), float(finite.max())
    if slowest_alone_s == 0.0:
        return found
    paces_s = np.geomspace(slowest_alone_s, max(slowest_s, slowest_alone_s), settings.paces) * (1 + 1e-9)
    both = np.repeat([0.0, 1.0], settings.paces)
    return found + paced_cuts(slot_s_nw, microbatches_nw, np.tile(paces_s, 2), both)


def turnaround(most: Floats, clocks: Floats, pp: int, run: Floats) -> Floats:
    """How much longer than its clocks an iteration with carry groups is because an hTask waits for its step.

    Alone, an hTask takes its micro-batches and the way through the pipeline. Micro-batches of others that
    stand between make it later, up to the length of a carry group: its step is done ``pp + run - 2`` clocks
    after its last one. Where there are fewer clocks than all that takes, the pipeline stands still.

    Args:
        most: Micro-batches of the hTask that has most.
        clocks: Micro-batches of all.
        pp: Stages.
        run: Micro-batches of the longest carry group.
    """
    later = np.minimum(run - 1, clocks - most)
    return np.asarray(np.maximum((most + pp - 1 + later) / clocks, 1.0))


def make_proposals(
    bands: GroupBands,
    prices: GroupPrices,
    room: Room,
    mesh: Mesh,
    templates: Sequence[Template],
    work_s: Sequence[Floats],
    partitions: Sequence[Places],
    *,
    overlaps: bool = False,
) -> list[Proposal]:
    """Estimate the iterations of some partitions.

    Args:
        bands: Bands of the groups.
        prices: Prices of the groups.
        room: Room for the groups on the mesh.
        mesh: The mesh.
        templates: Templates that may be used.
        work_s: Seconds of the groups on every stage; see :func:`stage_work_s`.
        partitions: Places of the groups of each partition.
        overlaps: Whether operators inside of a stage may overlap.
    """
    found: list[Proposal] = []
    shortest_first = sorted(range(len(partitions)), key=lambda i: len(partitions[i][0]))
    for start in range(0, len(partitions), _TOGETHER):
        some = shortest_first[start : start + _TOGETHER]
        chosen = [partitions[i] for i in some]
        found += _estimated(bands, prices, room, mesh, templates, work_s, chosen, overlaps)
    return [found[position] for position in np.argsort(shortest_first).tolist()]


_TOGETHER = 32
"""Partitions estimated at once: of about as many groups, and few enough for the processor's cache."""


def _estimated(
    bands: GroupBands,
    prices: GroupPrices,
    room: Room,
    mesh: Mesh,
    templates: Sequence[Template],
    work_s: Sequence[Floats],
    partitions: Sequence[Places],
    overlaps: bool,
) -> list[Proposal]:
    """:func:`make_proposals` of about as many groups each; arrays are ``[P, H]`` and ``[S, P, H]``."""
    settings = bands.problem.settings
    inside, places = _filled_up(partitions)
    m = np.where(inside, prices.microbatches_nw[places], 0).astype(np.float64)
    kinds = list({id(each): each for each in work_s}.values())
    of_stage = [next(k for k, kind in enumerate(kinds) if kind is each) for each in work_s]
    work_s_kph = np.array([kind[places] for kind in kinds])
    runs_p = np.where(inside, prices.carry_nw[places], 1).max(axis=1)
    bounds = partition_bounds(work_s_kph[of_stage], m, prices.p2p_s_nw[places], runs_p, inside)
    bound_s_p = bounds.of(templates)
    slot_s = work_s_kph.max(axis=0)
    longest_s_p = np.where(inside, slot_s, 0.0).max(axis=1)
    uneven_s_p = longest_s_p - np.where(inside, slot_s, np.inf).min(axis=1)
    hidden_s = m * prices.hidden_s_nw[places]
    layers = np.array(
        [
            max(n for n, k in zip(mesh.layers_per_stage, of_stage, strict=True) if k == kind)
            for kind in range(len(kinds))
        ]
    )
    least_s_p = ((m * work_s_kph).sum(axis=2) - layers[:, None] * hidden_s.sum(axis=1)).max(axis=0)
    least_share_p = np.minimum(1.0, least_s_p / bound_s_p)
    expected_s_p = np.maximum(bound_s_p, bounds.load_s + settings.uneven * (mesh.pp - 1) * uneven_s_p)
    waiting = turnaround(m.max(axis=1), m.sum(axis=1), mesh.pp, runs_p.astype(np.float64))
    expected_s_p = np.where(runs_p > 1, np.maximum(expected_s_p, bounds.load_s * waiting), expected_s_p)
    if overlaps:  # hTasks that share clocks even out, too
        expected_s_p = bound_s_p * (1 - settings.overlapped * (1 - least_share_p))
    layer_work_s_p = (m * prices.layer_s_nw[places] - settings.overlapped * hidden_s).sum(axis=1)
    needed_bytes_p = room.needed_bytes(places, inside)
    return [
        Proposal(
            bands=bands,
            mesh=mesh,
            layout_h=tuple(prices.layout_nw[own].tolist()),
            runner_up_h=tuple(prices.runner_up_nw[own].tolist()),
            places=own,
            bound_s=bound_s,
            load_s=load_s,
            layer_work_s=layer_work_s,
            expected_s=expected_s,
            least_share=least_share,
            needed_bytes=needed_bytes,
            has_room=needed_bytes <= room.memory_bytes,
        )
        for own, bound_s, load_s, layer_work_s, expected_s, least_share, needed_bytes in zip(
            partitions,
            bound_s_p.tolist(),
            bounds.load_s.tolist(),
            layer_work_s_p.tolist(),
            expected_s_p.tolist(),
            least_share_p.tolist(),
            needed_bytes_p.tolist(),
            strict=True,
        )
    ]


def _filled_up(partitions: Sequence[Places]) -> tuple[NDArray[np.bool_], Places]:
    """Whether there is a group, and its place, or that of the first one where there is none; ``[P, H]``."""
    counts = np.array([len(ends) for ends, _ in partitions])
    inside = np.arange(counts.max()) < counts[:, None]
    places = np.zeros(inside.shape, dtype=np.intp), np.zeros(inside.shape, dtype=np.intp)
    for side, filled in enumerate(places):
        filled[:] = np.array([own[side][0] for own in partitions])[:, None]
        filled[inside] = np.concatenate([own[side] for own in partitions])
    return inside, places
