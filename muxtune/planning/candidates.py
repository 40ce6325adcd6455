"""All that a search may look at: the partitions of all meshes that estimates put in front."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import lru_cache
from typing import cast

from muxtune.costs.base import CostModel
from muxtune.model import ModelSpec
from muxtune.planning.fusion import alignment_candidates, sort_by_tokens
from muxtune.planning.meshes import MeshShape, candidate_meshes
from muxtune.planning.options import PlanOptions
from muxtune.planning.pricing import StagePrices
from muxtune.planning.problem import PlanningProblem
from muxtune.planning.proposals import MeshProposals, propose_on_mesh
from muxtune.planning.ranking import GroupBands, GroupPrices, Layout, price_groups
from muxtune.planning.schedules import TEMPLATES
from muxtune.planning.sets import MOST_TASKS, RankedMesh, SetBands, propose_sets, rank_on_mesh

WIDEST_GROUP = 256
"""Tasks of an hTask at most, where there are more than 512; as a cap, not by a bound."""

Progress = Callable[[int, int], None]
"""Called with how many steps are done, and of how many."""


def propose(
    problem: PlanningProblem, options: PlanOptions, report: Progress = lambda done, of: None
) -> list[MeshProposals]:
    """Partitions worth a look by estimate, mesh by mesh."""
    shapes = candidate_meshes(problem.model, problem.cluster, options)
    templates = options.templates(TEMPLATES)
    by_tokens = sort_by_tokens(problem)
    wanted = layouts(problem, by_tokens, options)
    if len(by_tokens) <= MOST_TASKS:
        sets = SetBands(problem, by_tokens, wanted)
        ranked: list[RankedMesh] = []
        for shape, prices in _priced(sets, shapes):
            overlaps = shape.tp > 1 and "orchestration" not in options.without
            ranked += rank_on_mesh(sets, prices, shape, templates, overlaps=overlaps)
            report(len(ranked), 4 * len(shapes))
        return propose_sets(sets, ranked, templates)
    orders = [by_tokens, sorted(by_tokens, key=lambda t: problem.data[t].task.declared_microbatches)]
    width = len(by_tokens) if len(by_tokens) <= 2 * WIDEST_GROUP else WIDEST_GROUP
    found: list[MeshProposals] = []
    for task_ids in orders if orders[0] != orders[1] else orders[:1]:
        bands = GroupBands(problem, task_ids, width, wanted)
        for shape, prices in _priced(bands, shapes):
            found.append(propose_on_mesh(bands, prices, shape, templates))
            report(len(found), 4 * len(shapes))
    return found


def _priced(bands: GroupBands, shapes: Sequence[MeshShape]) -> Iterator[tuple[MeshShape, GroupPrices]]:
    """Shapes with estimates of all groups; of shapes that differ in ``pp`` alone these are the same."""
    problem = bands.problem
    largest = 4 ** math.ceil(math.log(bands.most_tokens, 4))  # problems of about a size share their curves
    per_tp: dict[int, StagePrices] = {}
    for tp, dp in dict.fromkeys((shape.tp, shape.dp) for shape in shapes):
        if tp not in per_tp:
            per_tp[tp] = _stage_prices(cast("Hashable", problem.costs), problem.model, tp, largest)
            per_tp[tp].place_between(bands.loras, bands.typical_tokens)  # for these tasks
        prices = price_groups(bands, per_tp[tp], dp)
        yield from ((shape, prices) for shape in shapes if (shape.tp, shape.dp) == (tp, dp))


@lru_cache(maxsize=32)
def _stage_prices(costs: CostModel, model: ModelSpec, tp: int, largest_tokens: int) -> StagePrices:
    """Kept from problem to problem, as a sweep plans many on the same device."""
    return StagePrices(costs, model, tp, largest_tokens)


def layouts(problem: PlanningProblem, task_ids: Sequence[str], options: PlanOptions) -> list[Layout]:
    """Alignments that groups are ranked with.

    A chunk never holds more than the same sequences packed, so chunks are not ranked beside ``pack``; they
    are priced, as everything is, for the partitions that win.

    Raises:
        SpecError: A chunk length is given for another alignment.
    """
    wanted = alignment_candidates(problem, task_ids, options.alignment, options.chunk_tokens)
    if any(alignment == "pack" for alignment, _ in wanted):
        return [layout for layout in wanted if layout[0] != "chunk"]
    if options.alignment == "chunk" and options.chunk_tokens is None:
        shortest = min(problem.longest_sequence([task_id]) for task_id in task_ids)
        largest = max(chunk or 0 for _, chunk in wanted)
        lengths = [1 << i for i in range((shortest - 1).bit_length(), largest.bit_length())]
        return [("chunk", length) for length in lengths]
    return list(wanted)
