"""All that a search may look at: the partitions of all meshes that estimates put in front."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Generic, TypeVar

import numpy as np

from muxtune.batches import ROW_MULTIPLE
from muxtune.costs.base import CostModel
from muxtune.model import ModelSpec
from muxtune.placement import Route
from muxtune.planning.decisions.options import PlanOptions
from muxtune.planning.decisions.structure import Layout, Mesh
from muxtune.planning.estimate.curves import Floats
from muxtune.planning.estimate.group_seconds import (
    GroupBands,
    GroupPrices,
    join_prices,
    price_groups,
    with_messages,
)
from muxtune.planning.estimate.part_seconds import StagePrices
from muxtune.planning.problem.carrying import carries_to_try, may_carry
from muxtune.planning.problem.layouts import (
    alignment_candidates,
    sort_by_tokens,
)
from muxtune.planning.problem.mesh_bounds import least_iteration_s
from muxtune.planning.problem.meshes import MeshShape, candidate_meshes
from muxtune.planning.problem.problem import PlanningProblem
from muxtune.planning.search.all_partitions import (
    RankedMesh,
    SetBands,
    propose_sets,
    rank_on_mesh,
)
from muxtune.planning.search.proposals import MeshProposals, Proposal, propose_on_mesh, stage_work_s

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
        settings = problem.settings
        one_method = options.one_method
        by_tokens = sort_by_tokens(problem)
        wanted = layouts(problem, by_tokens, options)
        if may_carry(options):
            wanted += [Layout("chunk", settings.carried_chunks[0], carry) for carry in settings.carries[1:]]
        self._sets: _Estimates[SetBands] | None = None
        self._contiguous: list[_Estimates[GroupBands]] = []
        self._within = settings.second_order_within
        if len(by_tokens) <= settings.all_partitions_up_to:
            self._sets = _Estimates(SetBands(problem, by_tokens, wanted, one_method=one_method), report)
            return
        declared = sorted(by_tokens, key=lambda t: problem.data[t].task.declared_microbatches)
        if one_method:  # only neighbours can share a group
            for order in (by_tokens, declared):
                order.sort(key=lambda t: problem.data[t].task.peft.method)
        orders = {"tokens": tuple(by_tokens), "declared": tuple(declared)}
        widest = settings.widest_group
        width = len(by_tokens) if len(by_tokens) <= 2 * widest else widest
        for task_ids in dict.fromkeys(orders[name] for name in settings.orders):
            bands = GroupBands(problem, task_ids, width, wanted, one_method=one_method)
            self._contiguous.append(_Estimates(bands, report))

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
        for number, estimates in enumerate(self._contiguous):
            if number > 0:
                shapes = _near(found, self._within, below_s)
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
    bands, settings = estimates.bands, estimates.bands.problem.settings
    templates = options.templates(settings.templates)
    ranked: list[RankedMesh] = []
    for shape in shapes:
        overlaps = shape.tp > 1 and "orchestration" not in options.without
        ranked += rank_on_mesh(
            bands,
            estimates.prices(shape),
            shape,
            templates,
            overlaps=overlaps,
            below_s=below_s / (1 - settings.slack),
        )
        estimates.report(len(ranked), 4 * len(shapes))
    best_s = min(below_s, *(each.least_safe_s for each in ranked))
    for each in list(ranked):
        if each.least_load_s < settings.worth_cutting * best_s:
            for prices in estimates.cut(each.shape, each.mesh):
                ranked += rank_on_mesh(
                    bands,
                    prices,
                    each.shape,
                    templates,
                    overlaps=each.overlaps,
                    below_s=min(below_s / (1 - settings.slack), settings.roughly_within * best_s),
                )
    return propose_sets(bands, ranked, templates, below_s)


def _propose_contiguous(
    estimates: _Estimates[GroupBands], shapes: Sequence[MeshShape], options: PlanOptions, below_s: float
) -> list[MeshProposals]:
    bands, settings = estimates.bands, estimates.bands.problem.settings
    templates = options.templates(settings.templates)
    found: list[MeshProposals] = []
    for shape in shapes:
        found.append(propose_on_mesh(bands, estimates.prices(shape), shape, templates))
        estimates.report(len(found), 4 * len(shapes))
    fit = [proposal for each in found for proposal in each.proposals if proposal.has_room]
    best = min(fit, key=lambda proposal: proposal.expected_s, default=None)
    best_s = below_s if best is None else min(below_s, best.expected_s)
    if best is not None and len(bands.tasks) > settings.cut_freely and not estimates.is_paced_by_one(best):
        return found
    for each in list(found):
        if (
            min((proposal.load_s for proposal in each.proposals), default=0.0)
            < settings.worth_cutting * best_s
        ):
            for prices in estimates.cut(each.shape, each.mesh):
                found.append(propose_on_mesh(bands, prices, each.shape, templates))
    return found


def _near(meshes: Sequence[MeshProposals], within: float, below_s: float) -> list[MeshShape]:
    """Shapes of the meshes whose least guess comes near the best."""
    least_s: dict[MeshShape, float] = {}
    for each in meshes:
        guess_s = min((proposal.expected_s for proposal in each.proposals), default=np.inf)
        least_s[each.shape] = min(guess_s, least_s.get(each.shape, np.inf))
    best_s = min([below_s, *least_s.values()])
    return [shape for shape in least_s if least_s[shape] <= within * best_s or not np.isfinite(best_s)]


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
        self._priced: dict[tuple[int, int, int], GroupPrices] = {}
        self._known: dict[tuple[int, int, int, tuple[Route, ...]], GroupPrices] = {}

    def prices(self, shape: MeshShape, carry: int | None = None) -> GroupPrices:
        """Prices on a mesh; see :func:`muxtune.planning.estimate.group_seconds.price_groups`."""
        bands, tp = self.bands, shape.tp
        messages = shape.on(bands.problem.cluster).message_routes()
        alike = (tp, shape.dp, carry or bands.carry)
        key = (*alike, messages)
        if key not in self._known:
            if tp not in self._per_tp:
                # Problems of about a size share their curves.
                largest = 4 ** math.ceil(math.log(bands.most_tokens, 4))
                shared = _stage_prices(
                    _Same(bands.problem.costs),
                    bands.problem.model,
                    tp,
                    largest,
                    bands.problem.settings.curve_points,
                )
                self._per_tp[tp] = shared.between(bands.pefts, bands.typical_tokens)
            if alike not in self._priced:
                self._priced[alike] = price_groups(bands, self._per_tp[tp], shape, carry)
            self._known[key] = with_messages(self._priced[alike], self._per_tp[tp], messages)
        return self._known[key]

    def cut(self, shape: MeshShape, mesh: Mesh) -> Iterator[GroupPrices]:
        """Prices with long micro-batches cut, for each of the paces that are tried."""
        carries = sorted({layout.carry for layout in self.bands.layouts})
        if mesh.pp == 1 or len(carries) == 1:
            return
        whole = self.prices(shape)
        slot_s = self._slots_s(shape, mesh)
        longest_s = float(slot_s[self.bands.alone].max())
        settings = self.bands.problem.settings
        for wanted in carries_to_try(slot_s, whole.tokens_nw, longest_s, settings.cuts_of_tasks, settings):
            alternatives = [self.prices(shape, carry) for carry in carries]
            yield join_prices(alternatives, np.searchsorted(carries, wanted))

    def is_paced_by_one(self, proposal: Proposal) -> bool:
        """Whether a single task's micro-batches are about the longest; fusing less does not shorten them."""
        mesh = proposal.mesh
        slot_s = self._slots_s(MeshShape(mesh.tp, mesh.pp, mesh.dp), mesh)
        alone_s, longest_s = slot_s[self.bands.alone].max(), slot_s[proposal.places].max()
        return bool(alone_s > self.bands.problem.settings.paced_by_one * longest_s)

    def _slots_s(self, shape: MeshShape, mesh: Mesh) -> Floats:
        return np.asarray(np.max(stage_work_s(self.bands, self.prices(shape), mesh), axis=0))


class _Same:
    """Costs as a key: costs need not be hashable, and are the same if they are one object."""

    def __init__(self, costs: CostModel) -> None:
        self.costs = costs

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.costs is self.costs

    def __hash__(self) -> int:
        return id(self.costs)


@lru_cache(maxsize=32)
def _stage_prices(costs: _Same, model: ModelSpec, tp: int, largest_tokens: int, points: int) -> StagePrices:
    """Kept from problem to problem, as a sweep plans many on one device; nothing in it is of a problem."""
    return StagePrices(costs.costs, model, tp, largest_tokens, points)


def layouts(problem: PlanningProblem, task_ids: Sequence[str], options: PlanOptions) -> list[Layout]:
    """Alignments that groups are ranked with.

    A chunk never holds more than the same sequences packed, so chunks are not ranked beside ``pack``; of few
    tasks they are priced for the partitions that are looked at.

    Raises:
        SpecError: A chunk length is given for another alignment.
    """
    wanted = alignment_candidates(problem, task_ids, options)
    if any(layout.alignment == "pack" for layout in wanted):
        return [layout for layout in wanted if layout.alignment != "chunk"]
    if options.alignment == "chunk" and options.chunk_tokens is None and (options.carry or 1) == 1:
        shortest = min(problem.longest_sequence([task_id]) for task_id in task_ids)
        largest = max(layout.chunk_tokens or 0 for layout in wanted)
        smallest = max(1 << (shortest - 1).bit_length() >> problem.settings.chunk_candidates, ROW_MULTIPLE)
        return [Layout("chunk", 1 << i) for i in range(smallest.bit_length() - 1, largest.bit_length())]
    return wanted
