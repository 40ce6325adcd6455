"""All groups and all partitions of a few tasks, by estimate.

Contiguous groups in one order miss what fuses tasks that the order keeps apart. Of few
tasks (``all_partitions_up_to``) there are few enough groups to estimate them all, and few enough partitions
to rank them all: what :mod:`muxtune.planning.estimate.group_seconds` says of bands holds for any arrays of
groups. So all partitions of all meshes are ranked at once by a rough guess at their iterations, and those in
front become proposals.
"""

# Shapes, in names in lower case: n tasks, g groups (2^n - 1, in the order of their masks), p partitions,
# S stages. Bands are [g, 1] here.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from muxtune.planning.decisions.partition_dp import Places, set_partitions
from muxtune.planning.decisions.structure import Layout, Mesh
from muxtune.planning.estimate.curves import Floats, Ints
from muxtune.planning.estimate.group_seconds import GroupBands, GroupPrices
from muxtune.planning.estimate.memory_bound import Room, room_for_groups
from muxtune.planning.exact.bounds import bound_terms
from muxtune.planning.problem.meshes import MeshShape, balanced_layers, mesh_of
from muxtune.planning.problem.problem import PlanningProblem
from muxtune.planning.search.proposals import (
    MeshProposals,
    loads_s,
    make_proposals,
    stage_work_s,
    turnaround,
)
from muxtune.schedule import Template


@lru_cache(maxsize=16)
def _partition_rows(count: int) -> NDArray[np.intp]:
    """``[p, n]``: rows of the groups of every partition, filled up with the row behind the last group."""
    beyond = (1 << count) - 1
    masks = [(*groups, *(beyond + 1,) * (count - len(groups))) for groups in set_partitions(count)]
    return np.array(masks, dtype=np.intp) - 1


class SetBands(GroupBands):
    """What is known of all groups before they are priced, as bands of one column.

    Args:
        problem: The planning problem.
        task_ids: Ids of a few tasks; their order decides how micro-batches of groups are
            laid out.
        layouts: Layouts that may be used.
        one_method: Whether only tasks of one PEFT method may share a group.
    """

    def __init__(
        self,
        problem: PlanningProblem,
        task_ids: Sequence[str],
        layouts: Sequence[Layout],
        *,
        one_method: bool = False,
    ) -> None:
        super().__init__(problem, task_ids, len(task_ids), layouts, one_method=one_method)
        masks = np.arange(1, 1 << len(task_ids))
        self._member_gn = (masks[:, None] >> np.arange(len(task_ids)) & 1).astype(np.bool_)
        self._filled: dict[bytes, Ints] = {}

    def sum(self, values_n: Floats) -> Floats:
        """Sum over the tasks of every group."""
        return np.asarray(np.tensordot(self._member_gn.astype(np.float64), values_n, 1)[:, None])

    def max(self, values_n: Ints) -> Ints:
        """Maximum over the tasks of every group."""
        return np.asarray(np.where(self._member_gn, values_n, np.min(values_n)).max(axis=1)[:, None])

    def members(self, places: Places) -> list[tuple[str, ...]]:
        """Task ids of the groups in some places."""
        return [
            tuple(
                task_id for task_id, member in zip(self.task_ids, self._member_gn[row], strict=True) if member
            )
            for row in places[0]
        ]

    @cached_property
    def exists_nw(self) -> NDArray[np.bool_]:
        """Whether a group exists: every one does."""
        return np.ones((len(self._member_gn), 1), dtype=np.bool_)

    @cached_property
    def alone(self) -> Places:
        """Where the tasks stand as groups of their own."""
        return places_of((1 << np.arange(len(self.tasks))) - 1)

    def _packed(self, sizes_nsg: Ints, wanted_nw: NDArray[np.bool_], multiple: int) -> Ints:
        """Packed tokens of every set of tasks: those of the set without its first task, and then that task.

        The rule is that of :func:`muxtune.planning.estimate.stream_tokens.packed_tokens`.
        """
        largest_first = -np.sort(-sizes_nsg, axis=2)
        count, steps, _ = sizes_nsg.shape
        filled = np.zeros((1 << count, *sizes_nsg.shape[1:]), dtype=sizes_nsg.dtype)
        for task in range(count - 1, -1, -1):
            # Groups whose first task this is: what the later tasks form, and this one.
            rest = filled[:: 1 << (task + 1)]
            own = rest + largest_first[task]
            own.sort(axis=2)
            filled[1 << task :: 1 << (task + 1)] = own
        last_step = np.where(self._member_gn, self.batches.steps_n, steps).min(axis=1)
        while_all_train = np.arange(steps) < last_step[:, None]
        tokens = (filled[1:, :, -1] * while_all_train).max(axis=1)[:, None]
        return np.asarray(-(-tokens // multiple) * multiple * wanted_nw)


def places_of(rows: NDArray[np.intp]) -> Places:
    """Places of groups in bands of one column."""
    return rows, np.zeros(len(rows), dtype=np.intp)


@dataclass(frozen=True)
class RankedMesh:
    """Partitions on a mesh: all, or those with the least load."""

    shape: MeshShape
    mesh: Mesh
    prices: GroupPrices
    room: Room
    work_s: list[Floats]
    guess_s_p: Floats
    """Guess at the seconds of an iteration; infinite where a group has no room."""
    rows_pn: NDArray[np.intp]
    """Rows of the groups of every partition, filled up with the row behind the last group."""
    bound_s_p: Floats
    """Bound of the iterations in seconds, if the estimates are right; all that can be is hidden."""
    least_load_s: float
    """Least work of the busiest stage in seconds, also of partitions without room: cut, they may have it."""
    layer_work_s: float
    """Least work of a partition in an iteration, in a layer of all replicas; what overlaps as expected."""
    overlaps: bool
    """Whether operators inside of a stage may overlap."""
    safe_p: NDArray[np.bool_]
    """Whether every group fits even if every open micro-batch is as large as its own."""

    @property
    def least_safe_s(self) -> float:
        """Least guess at a partition that surely fits the memory."""
        return float(np.where(self.safe_p, self.guess_s_p, np.inf).min(initial=np.inf))


def rank_on_mesh(
    bands: SetBands,
    prices: GroupPrices,
    shape: MeshShape,
    templates: Sequence[Template],
    *,
    overlaps: bool,
    below_s: float = np.inf,
) -> list[RankedMesh]:
    """All partitions with layers balanced for the tasks one by one, and for the best of these partitions.

    Args:
        bands: Bands of the groups.
        prices: Prices of the groups.
        shape: Shape of the mesh.
        templates: Templates that may be used.
        overlaps: Whether operators inside of a stage may overlap.
        below_s: Partitions are left out whose busiest stage has more work than this, even if all is hidden
            that can be.
    """
    layers = bands.problem.model.layers
    mesh = mesh_of(shape, balanced_layers(layers, shape.pp, *loads_s(bands, prices, shape, bands.alone)))
    ranked = [_rank(bands, prices, shape, mesh, templates, overlaps, below_s)]
    if not len(ranked[0].guess_s_p):
        return ranked
    best = int(ranked[0].guess_s_p.argmin())
    if shape.pp > 1 and np.isfinite(ranked[0].guess_s_p[best]):
        loads = loads_s(bands, prices, shape, _places(bands, ranked[0], best))
        rebalanced = mesh_of(shape, balanced_layers(layers, shape.pp, *loads))
        if rebalanced != mesh:
            ranked.append(_rank(bands, prices, shape, rebalanced, templates, overlaps, below_s))
    return ranked


def _rank(
    bands: SetBands,
    prices: GroupPrices,
    shape: MeshShape,
    mesh: Mesh,
    templates: Sequence[Template],
    overlaps: bool,
    below_s: float,
) -> RankedMesh:
    """Guess at the iterations from what :mod:`muxtune.planning.exact.bounds` says group by group."""
    settings = bands.problem.settings
    work_s = stage_work_s(bands, prices, mesh)
    room = room_for_groups(bands, prices, mesh)
    work_s_sg = np.array([each[:, 0] for each in work_s])
    m_g = prices.microbatches_nw[:, 0].astype(np.float64)
    half_s_sg = 0.5 * work_s_sg
    terms = bound_terms(half_s_sg, half_s_sg, m_g, prices.p2p_s_nw[:, 0])
    slot_s_g = work_s_sg.max(axis=0)
    window_s_g = terms.window_s(prices.run)[0]
    rows = _partition_rows(len(bands.tasks))
    rows = rows[_all_of(bands.allowed_nw[:, 0], rows)]
    load_s = _of_groups(m_g * slot_s_g, rows, 0.0).sum(axis=1)
    least_load_s = float(load_s.min())
    possible = _all_of(room.possible_nw[:, 0], rows)
    safe = _all_of(room.safe_nw[:, 0], rows)
    if len(rows) > settings.ranked_by_load:
        most = settings.ranked_by_load
        kept = np.unique(
            [np.argpartition(np.where(m, load_s, np.inf), most)[:most] for m in (possible, safe)]
        )
        rows, load_s, possible, safe = rows[kept], load_s[kept], possible[kept], safe[kept]
    layer_work_s_g = m_g * (prices.layer_s_nw - settings.overlapped * prices.hidden_s_nw)[:, 0]
    least_layer_work_s = float(_of_groups(layer_work_s_g, rows, 0.0).sum(axis=1).min())
    hidden_s_g = overlaps * m_g * max(mesh.layers_per_stage) * prices.hidden_s_nw[:, 0]
    if np.isfinite(below_s):
        hidden_s = _of_groups(hidden_s_g, rows, 0.0).sum(axis=1) if overlaps else 0.0
        kept = np.flatnonzero(load_s - hidden_s < below_s)
        rows, load_s, possible, safe = rows[kept], load_s[kept], possible[kept], safe[kept]
    guess_s = np.maximum(load_s, _of_groups(window_s_g, rows, 0.0).sum(axis=1))
    guess_s = np.maximum(guess_s, _of_groups(terms.chain_s, rows, 0.0).max(axis=1))
    if "continuous" not in templates:
        busiest = work_s_sg.argmax(axis=0), np.arange(len(m_g))
        drain_s_g = terms.head_s[busiest] + terms.tail_s[busiest]
        guess_s = np.maximum(guess_s, load_s + _of_groups(drain_s_g, rows, np.inf).min(axis=1))
    bound_s = guess_s.copy()
    if prices.run > 1:
        m = _of_groups(m_g, rows, 0.0)
        runs = _of_groups(prices.carry_nw[:, 0], rows, 1.0).max(axis=1)
        guess_s = np.maximum(guess_s, load_s * turnaround(m.max(axis=1), m.sum(axis=1), mesh.pp, runs))
    slots_s = _of_groups(slot_s_g, rows, 0.0)
    uneven_s = slots_s.max(axis=1) - np.where(slots_s > 0, slots_s, np.inf).min(axis=1)
    if overlaps:
        hidden_s = _of_groups(hidden_s_g, rows, 0.0).sum(axis=1)
        guess_s -= settings.overlapped * hidden_s
        bound_s = load_s - hidden_s
    else:
        guess_s = np.maximum(guess_s, load_s + settings.uneven * (mesh.pp - 1) * uneven_s)
    return RankedMesh(
        shape=shape,
        mesh=mesh,
        prices=prices,
        room=room,
        work_s=work_s,
        guess_s_p=np.where(possible, guess_s, np.inf),
        bound_s_p=bound_s,
        rows_pn=rows,
        least_load_s=least_load_s,
        layer_work_s=mesh.dp * least_layer_work_s,
        overlaps=overlaps,
        safe_p=safe,
    )


def _of_groups(values_g: NDArray[np.generic], rows: NDArray[np.intp], beyond: float) -> Floats:
    """``[p, n]``: a value of every group of every partition, and another where there are no more."""
    return np.append(values_g, beyond)[rows]


def _all_of(groups_g: NDArray[np.bool_], rows: NDArray[np.intp]) -> NDArray[np.bool_]:
    """``[p]``: whether something is true of all groups of a partition."""
    if groups_g.all():
        return np.ones(len(rows), dtype=np.bool_)
    return np.asarray(np.append(groups_g, True)[rows].all(axis=1))


def _places(bands: SetBands, ranked: RankedMesh, partition: int) -> Places:
    rows = ranked.rows_pn[partition]
    return places_of(rows[rows < len(bands.exists_nw)])


def propose_sets(
    bands: SetBands, ranked: Sequence[RankedMesh], templates: Sequence[Template], below_s: float = np.inf
) -> list[MeshProposals]:
    """The partitions in front on each mesh that comes near the best.

    Of those that may not fit the memory, too: guesses are too rough to say that one with room is faster,
    above all where stages overlap.

    Args:
        bands: Bands of the groups.
        ranked: All partitions on some meshes.
        templates: Templates that may be used.
        below_s: Seconds of an iteration that is possible on another mesh; what cannot be faster is left out.
    """
    settings = bands.problem.settings
    least_safe_s = min((each.least_safe_s for each in ranked), default=np.inf)
    near_s, roughly_near_s = settings.within * least_safe_s, settings.roughly_within * least_safe_s
    found = []
    for each in ranked:
        wanted = [
            (each.safe_p, near_s, roughly_near_s),
            (~each.safe_p, near_s, near_s),
        ]
        chosen: list[int] = []
        for mask, most_s, roughly_s in wanted:
            may_win = each.bound_s_p * (1 - settings.slack) < below_s
            guess_s = np.where(mask & may_win, each.guess_s_p, np.inf)
            front = np.argsort(guess_s, kind="stable")[: settings.per_mesh]
            front = front[may_win[front]]
            near = int((guess_s[front] <= most_s).sum())
            if near:
                near += int((guess_s[front[near : settings.roughly_first]] <= roughly_s).sum())
            chosen += front[:near].tolist()
        proposals = make_proposals(
            bands,
            each.prices,
            each.room,
            each.mesh,
            templates,
            each.work_s,
            [_places(bands, each, partition) for partition in chosen],
            overlaps=each.overlaps,
        )
        found.append(MeshProposals(each.shape, each.mesh, tuple(proposals), each.layer_work_s))
    return found
