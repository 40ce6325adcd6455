"""All groups and all partitions at once: the same estimates as of bands, and none left out."""

from __future__ import annotations

import numpy as np
import pytest

from muxtune.planning.decisions.options import FREE, PlanOptions
from muxtune.planning.decisions.partition_dp import set_partitions
from muxtune.planning.decisions.settings import DEFAULT_SETTINGS
from muxtune.planning.estimate.group_seconds import GroupBands, price_groups
from muxtune.planning.estimate.part_seconds import StagePrices
from muxtune.planning.problem.layouts import sort_by_tokens
from muxtune.planning.problem.meshes import MeshShape
from muxtune.planning.search.all_partitions import SetBands, places_of, propose_sets, rank_on_mesh
from muxtune.planning.search.candidates import layouts, propose
from muxtune.planning.search.search import search_structures
from tests.muxtune.planning.estimate.test_group_seconds import gpu_problem
from tests.muxtune.planning.problems import MIXED, FakeCosts, make_problem


def bands_of(problem):
    task_ids = sort_by_tokens(problem)
    wanted = layouts(problem, task_ids, FREE)
    return SetBands(problem, task_ids, wanted), GroupBands(problem, task_ids, len(task_ids), wanted)


@pytest.mark.parametrize("dp", [1, 2])
def test_contiguous_groups_are_estimated_as_in_bands(dp):
    problem = gpu_problem(6, cluster="testbed-c")
    sets, bands = bands_of(problem)
    prices = StagePrices(problem.costs, problem.model, 1, bands.most_tokens, DEFAULT_SETTINGS.curve_points)
    prices = prices.between(bands.pefts, bands.typical_tokens)
    shape = MeshShape(1, 1, dp)
    of_sets, of_bands = price_groups(sets, prices, shape), price_groups(bands, prices, shape)
    for end in range(6):
        for w in range(end + 1):
            row = sum(1 << task for task in range(end - w, end + 1)) - 1
            assert sets.members(places_of(np.array([row]))) == [sets.task_ids[end - w : end + 1]]
            for name in (
                "microbatches_nw",
                "layout_nw",
                "tokens_nw",
                "layer_s_nw",
                "first_s_nw",
                "last_s_nw",
            ):
                wanted = getattr(of_bands, name)[end, w]
                assert getattr(of_sets, name)[row, 0] == pytest.approx(wanted, rel=1e-9), name


def test_tokens_of_all_groups_are_those_of_their_shapes():
    problem = make_problem()
    sets, _ = bands_of(problem)
    pack = next(
        band
        for band in [sets.layout_band(layout, 1) for layout in sets.layouts]
        if band.layout.alignment == "pack"
    )
    for row in range(len(sets.exists_nw)):
        (group,) = sets.members(places_of(np.array([row])))
        assert pack.tokens_nw[row, 0] == problem.shape(group, "pack").tokens


def test_every_partition_is_ranked_and_those_in_front_are_proposed():
    problem = make_problem(costs=FakeCosts(launch_s=1e-4))
    sets, _ = bands_of(problem)
    prices = StagePrices(problem.costs, problem.model, 1, sets.most_tokens, DEFAULT_SETTINGS.curve_points)
    ranked = rank_on_mesh(
        sets,
        price_groups(sets, prices, MeshShape(1, 2, 1)),
        MeshShape(1, 2, 1),
        DEFAULT_SETTINGS.templates,
        overlaps=False,
    )
    assert all(len(each.guess_s_p) == len(list(set_partitions(len(MIXED)))) == 52 for each in ranked)
    assert all(np.isfinite(each.guess_s_p).all() and each.safe_p.all() for each in ranked)
    for found in propose_sets(sets, ranked, DEFAULT_SETTINGS.templates):
        for proposal in found.proposals:
            tasks = [task_id for group in proposal.groups() for task_id in group]
            assert sorted(tasks) == sorted(problem.data)


@pytest.mark.parametrize("template", ["continuous", "flush"])
def test_guesses_are_near_what_is_expected_of_a_partition(template):
    problem = gpu_problem(5, cluster="testbed-a")
    for found in propose(problem, PlanOptions(tp=1, template=template)):
        guesses = [proposal.expected_s for proposal in found.proposals]
        # They are proposed in the order of the guesses, which group by group cannot see all bounds.
        assert guesses == pytest.approx(sorted(guesses), rel=0.03)


def test_groups_without_room_are_in_no_proposal():
    roomy = make_problem()
    needed = max(stage.total_bytes for stage in roomy.memory(search_structures(roomy).structures[0]))
    small = make_problem(memory_bytes=int(0.8 * needed))
    sets, _ = bands_of(small)
    prices = StagePrices(small.costs, small.model, 1, sets.most_tokens, DEFAULT_SETTINGS.curve_points)
    (ranked, *_) = rank_on_mesh(
        sets,
        price_groups(sets, prices, MeshShape(1, 2, 1)),
        MeshShape(1, 2, 1),
        DEFAULT_SETTINGS.templates,
        overlaps=False,
    )
    assert not ranked.safe_p.all()
    for found in propose_sets(sets, [ranked], DEFAULT_SETTINGS.templates):
        rows = np.concatenate([proposal.places[0] for proposal in found.proposals])
        assert ranked.room.possible_nw[rows, 0].all()
