"""All that a search may look at: the partitions of all meshes that estimates put in front."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Generic, TypeVar, cast

import numpy as np

from muxtune.batches import ROW_MULTIPLE
from muxtune.costs.base import CostModel
from muxtune.model import ModelSpec
from muxtune.placement import Route
from muxtune.planning.decisions.options import PlanOptions
from muxtune.planning.decisions.structure import Layout, Mesh
from muxtune.planning.estimate.curves import Floats
from muxtune.planning.estimate.group_seconds import GroupBands, GroupPrices, join_prices, price_groups
from muxtune.planning.estimate.part_seconds import StagePrices
from muxtune.planning.problem.carrying import CARRIES, CUTS_OF_TASKS, carries_at, may_carry
from muxtune.planning.problem.layouts import (
    CARRIED_CHUNKS,
    CHUNK_CANDIDATES,
    alignment_candidates,
    sort_by_tokens,
)
from muxtune.planning.problem.mesh_bounds import least_iteration_s
from muxtune.planning.problem.meshes import MeshShape, candidate_meshes
from muxtune.planning.problem.problem import PlanningProblem
from muxtune.planning.problem.schedules import TEMPLATES
from muxtune.planning.search.all_partitions import (
    MOST_TASKS,
    RankedMesh,
    SetBands,
    propose_sets,
    rank_on_mesh,
)
from muxtune.planning.search.proposals import MeshProposals, Proposal, propose_on_mesh, stage_work_s

WIDEST_GROUP = 256
"""Most tasks of an hTask where there are more than 512 tasks; a cap for time, which no bound justifies."""

WORTH_CUTTING = 0.98
"""Micro-batches are cut on a mesh only if the least work that any partition has there on its busiest stage is
below this share of the best iteration that is expected without cutting."""

CUT_FREELY = 64
"""With more tasks than this, micro-batches are cut only where a single task's are among the longest."""

PACED_BY_ONE = 0.7
"""A single task's micro-batch is among the longest if it takes more than this share of the longest one's
time."""

Progress = Callable[[int, int], None]
"""Called with how many steps are done, and of how many."""


def propose(
    problem: PlanningProblem, options: PlanOptions, report: Progress = lambda done, of: None
) -> list[MeshProposals]:
    """Partitions worth a look by estimate, on meshes of as many ranks as there are; see :class:`Ranking`."""
    return Ranking(problem, options, report).propose(
        candidate_meshes(problem.model, problem.cluster, options)
    )


class Ranking:
    """Partitions worth a look by estimate, mesh by mesh; with long micro-batches cut, where that may help.

    Args:
        problem: The planning problem.
        options: Decisions that are taken away from the search.
        report: Is told how far it is.
    """

    def __init__(
        self, problem: PlanningProblem, options: PlanOptions, report: Progress = lambda done, of: None
    ) -> None:
        self._options = options
        self._layers = problem.model.layers
        self._layer_work_s: dict[int, float] = {}
        by_tokens = sort_by_tokens(problem)
        wanted = layouts(problem, by_tokens, options)
        if may_carry(options):
            wanted += [Layout("chunk", CARRIED_CHUNKS[0], carry) for carry in CARRIES[1:]]
        self._sets: _Estimates[SetBands] | None = None
        self._contiguous: list[_Estimates[GroupBands]] = []
        if len(by_tokens) <= MOST_TASKS:
            self._sets = _Estimates(SetBands(problem, by_tokens, wanted), report)
            return
        orders = [by_tokens, sorted(by_tokens, key=lambda t: problem.data[t].task.declared_microbatches)]
        width = len(by_tokens) if len(by_tokens) <= 2 * WIDEST_GROUP else WIDEST_GROUP
        for task_ids in orders if orders[0] != orders[1] else orders[:1]:
            self._contiguous.append(_Estimates(GroupBands(problem, task_ids, width, wanted), report))

    def propose(self, shapes: Sequence[MeshShape], below_s: float = np.inf) -> list[MeshProposals]:
        """Partitions on some meshes.

        Args:
            shapes: Shapes of the meshes.
            below_s: Seconds of an iteration that is possible on another mesh; what would be much slower is
                left out.
        """
        found: list[MeshProposals] = []
        if self._sets is not None:
            found += _propose_sets(self._sets, shapes, self._options, below_s)
        for estimates in self._contiguous:
            found += _propose_contiguous(estimates, shapes, self._options, below_s)
        for each in found:
            known_s = self._layer_work_s.get(each.shape.tp, np.inf)
            self._layer_work_s[each.shape.tp] = min(known_s, each.layer_work_s)
        return _distinct(found)

    def least_s(self, shape: MeshShape) -> float:
        """What an iteration on a mesh takes at least, by the least work seen with as many ranks per stage."""
        layer_work_s = self._layer_work_s.get(shape.tp, np.inf)
        if not np.isfinite(layer_work_s):
            return 0.0
        return least_iteration_s(layer_work_s, shape, self._layers)


def _propose_sets(
    estimates: _Estimates[SetBands], shapes: Sequence[MeshShape], options: PlanOptions, below_s: float
) -> list[MeshProposals]:
    bands, templates = estimates.bands, options.templates(TEMPLATES)
    ranked: list[RankedMesh] = []
    for shape in shapes:
        overlaps = shape.tp > 1 and "orchestration" not in options.without
        ranked += rank_on_mesh(bands, estimates.prices(shape), shape, templates, overlaps=overlaps)
        estimates.report(len(ranked), 4 * len(shapes))
    best_s = min(below_s, *(each.least_safe_s for each in ranked))
    for each in list(ranked):
        if float(each.load_s_p.min()) < WORTH_CUTTING * best_s:
            for prices in estimates.cut(each.shape, each.mesh):
                ranked += rank_on_mesh(bands, prices, each.shape, templates, overlaps=each.overlaps)
    return propose_sets(bands, ranked, templates, below_s)


def _propose_contiguous(
    estimates: _Estimates[GroupBands], shapes: Sequence[MeshShape], options: PlanOptions, below_s: float
) -> list[MeshProposals]:
    bands, templates = estimates.bands, options.templates(TEMPLATES)
    found: list[MeshProposals] = []
    for shape in shapes:
        found.append(propose_on_mesh(bands, estimates.prices(shape), shape, templates))
        estimates.report(len(found), 4 * len(shapes))
    fit = [proposal for each in found for proposal in each.proposals if proposal.has_room]
    best = min(fit, key=lambda proposal: proposal.expected_s, default=None)
    best_s = below_s if best is None else min(below_s, best.expected_s)
    if best is not None and len(bands.tasks) > CUT_FREELY and not estimates.is_paced_by_one(best):
        return found
    for each in list(found):
        if min((proposal.load_s for proposal in each.proposals), default=0.0) < WORTH_CUTTING * best_s:
            for prices in estimates.cut(each.shape, each.mesh):
                found.append(propose_on_mesh(bands, prices, each.shape, templates))
    return found


def _distinct(meshes: Iterable[MeshProposals]) -> list[MeshProposals]:
    """Proposals without repetitions: several paces may cut a partition in the same way."""
    known: set[tuple[object, ...]] = set()
    found = []
    for each in meshes:
        new = []
        for proposal in each.proposals:
            places = tuple(rows.tobytes() for rows in proposal.places)
            key = (id(proposal.bands), proposal.mesh, places, proposal.layout_h)
            if key not in known:
                known.add(key)
                new.append(proposal)
        found.append(replace(each, proposals=tuple(new)))
    return found


Bands = TypeVar("Bands", bound=GroupBands)


class _Estimates(Generic[Bands]):
    """Estimates of all groups on meshes.

    Of meshes that differ in ``pp`` alone these are the same, but for messages that take other links.
    """

    def __init__(self, bands: Bands, report: Progress) -> None:
        self.bands = bands
        self.report = report
        self._per_tp: dict[int, StagePrices] = {}
        self._known: dict[tuple[int, int, int, tuple[Route, ...]], GroupPrices] = {}

    def prices(self, shape: MeshShape, carry: int | None = None) -> GroupPrices:
        """Prices on a mesh; see :func:`muxtune.planning.estimate.group_seconds.price_groups`."""
        bands, tp = self.bands, shape.tp
        messages = shape.on(bands.problem.cluster).message_routes()
        key = (tp, shape.dp, carry or bands.carry, messages)
        if key not in self._known:
            if tp not in self._per_tp:
                # Problems of about a size share their curves.
                largest = 4 ** math.ceil(math.log(bands.most_tokens, 4))
                costs = cast("Hashable", bands.problem.costs)
                shared = _stage_prices(costs, bands.problem.model, tp, largest)
                self._per_tp[tp] = shared.between(bands.loras, bands.typical_tokens)
            self._known[key] = price_groups(bands, self._per_tp[tp], shape, carry)
        return self._known[key]

    def cut(self, shape: MeshShape, mesh: Mesh) -> Iterator[GroupPrices]:
        """Prices with long micro-batches cut, for each of the paces that are tried."""
        carries = sorted({layout.carry for layout in self.bands.layouts})
        if mesh.pp == 1 or len(carries) == 1:
            return
        whole = self.prices(shape)
        slot_s = self._slots_s(shape, mesh)
        slowest_s = float(slot_s[self.bands.alone].max())
        known: set[bytes] = set()
        for cut in CUTS_OF_TASKS:
            wanted = carries_at(slowest_s / cut, slot_s, whole.tokens_nw)
            if wanted.max() > 1 and wanted.tobytes() not in known:
                known.add(wanted.tobytes())
                alternatives = [self.prices(shape, carry) for carry in carries]
                yield join_prices(alternatives, np.searchsorted(carries, wanted))

    def is_paced_by_one(self, proposal: Proposal) -> bool:
        """Whether a single task's micro-batches are about the longest; fusing less does not shorten them."""
        mesh = proposal.mesh
        slot_s = self._slots_s(MeshShape(mesh.tp, mesh.pp, mesh.dp), mesh)
        return bool(slot_s[self.bands.alone].max() > PACED_BY_ONE * slot_s[proposal.places].max())

    def _slots_s(self, shape: MeshShape, mesh: Mesh) -> Floats:
        return np.asarray(np.max(stage_work_s(self.bands, self.prices(shape), mesh), axis=0))


@lru_cache(maxsize=32)
def _stage_prices(costs: CostModel, model: ModelSpec, tp: int, largest_tokens: int) -> StagePrices:
    """Kept from problem to problem, as a sweep plans many on one device; nothing in it is of a problem."""
    return StagePrices(costs, model, tp, largest_tokens)


def layouts(problem: PlanningProblem, task_ids: Sequence[str], options: PlanOptions) -> list[Layout]:
    """Alignments that groups are ranked with.

    A chunk never holds more than the same sequences packed, so chunks are not ranked beside ``pack``; they
    are priced, as everything is, for the partitions that win.

    Raises:
        SpecError: A chunk length is given for another alignment.
    """
    wanted = alignment_candidates(problem, task_ids, options)
    if any(layout.alignment == "pack" for layout in wanted):
        return [layout for layout in wanted if layout.alignment != "chunk"]
    if options.alignment == "chunk" and options.chunk_tokens is None and (options.carry or 1) == 1:
        shortest = min(problem.longest_sequence([task_id]) for task_id in task_ids)
        largest = max(layout.chunk_tokens or 0 for layout in wanted)
        smallest = max(1 << (shortest - 1).bit_length() >> CHUNK_CANDIDATES, ROW_MULTIPLE)
        return [Layout("chunk", 1 << i) for i in range(smallest.bit_length() - 1, largest.bit_length())]
    return wanted
