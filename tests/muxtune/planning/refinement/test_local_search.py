"""Local search over partitions: its steps, its limits, and that it does not lose what it starts from."""

from __future__ import annotations

from itertools import combinations, product

import pytest

from benchmarks.helpers.fusion_instances import draw_instance
from muxtune.planning.decisions.options import FREE, PlanOptions
from muxtune.planning.decisions.partition_dp import set_partitions
from muxtune.planning.decisions.settings import Effort
from muxtune.planning.oracle.exhaustive import best_of_all, task_appraiser
from muxtune.planning.problem.assemble import structure_schedule
from muxtune.planning.problem.memory_limit import fits, fitting
from muxtune.planning.refinement.appraiser import Appraiser
from muxtune.planning.refinement.local_search import (
    BRIEF,
    CostEstimate,
    dp_starts,
    refined_partitions,
    steps,
    task_orders,
)
from muxtune.support.errors import SpecError
from tests.muxtune.planning.problems import MIXED, FakeCosts, make_problem

ALIKE = [{"max_length": length, "micro_batch_size": size} for length in (64, 128) for size in (1, 4)]


def changed(groups, old, new):
    return tuple(sorted([*(mask for mask in groups if mask not in old), *new]))


def masks_of(labels):
    """The partition that puts tasks with equal labels together."""
    return tuple(sorted(sum(1 << t for t, own in enumerate(labels) if own == label) for label in set(labels)))


def test_steps_lead_to_all_moves_swaps_and_unions_and_to_nothing_but_partitions():
    count = 5
    partitions = set(set_partitions(count))
    for labels in product(range(3), repeat=count):
        groups = masks_of(labels)
        moved = {masks_of([*labels[:t], new, *labels[t + 1 :]]) for t in range(count) for new in (0, 1, 2, 3)}
        swapped = set()
        for one, other in combinations(range(count), 2):
            exchanged = list(labels)
            exchanged[one], exchanged[other] = labels[other], labels[one]
            swapped.add(masks_of(exchanged))
        united = {
            masks_of([one if own == other else own for own in labels])
            for one, other in combinations(range(3), 2)
        }
        reached = {changed(groups, old, new) for old, new in steps(groups, [tuple(range(count))])}
        assert (moved | swapped | united) - {groups} <= reached <= partitions - {groups}


def test_any_partition_can_be_reached_from_any_other():
    order = [tuple(range(4))]
    for start in set_partitions(4):
        seen, front = {start}, [start]
        while front:
            here = front.pop()
            for old, new in steps(here, order):
                there = changed(here, old, new)
                if there not in seen:
                    seen.add(there)
                    front.append(there)
        assert len(seen) == 15


def test_orders_are_permutations_and_the_first_is_by_tokens():
    table = task_appraiser(make_problem(), FREE).table
    orders = task_orders(table)
    assert orders[0] == tuple(range(len(MIXED)))
    assert len(set(orders)) == len(orders) > 1
    assert all(sorted(order) == list(range(len(MIXED))) for order in orders)


@pytest.mark.parametrize("seed", range(950, 962))
def test_refinement_is_never_worse_than_the_partitions_it_starts_from(seed):
    instance = draw_instance(seed, most_tasks=6)
    options = PlanOptions(tp=1, pp=instance.pp, dp=1)
    appraiser = task_appraiser(instance.problem, options)
    refined = refined_partitions(appraiser)
    starts = [appraiser.appraise(groups) for groups in dp_starts(appraiser.table, 3)]
    fastest_s = min((each.seconds for each in starts if each is not None), default=None)
    if fastest_s is not None:
        assert refined[0].seconds <= fastest_s
    assert [each.seconds for each in refined] == sorted(each.seconds for each in refined)
    assert all(fits(instance.problem, each.structure) for each in refined)


def test_refinement_finds_what_contiguity_costs():
    """By tokens, tasks with one and with four micro-batches alternate; fused, they all take four."""
    tasks = [
        {
            "global_batch_size": 4,
            "micro_batch_size": size,
            "max_length": length,
            "dataset": {"lengths": "rte"},
        }
        for length, size in ((200, 1), (50, 4), (210, 1), (54, 4), (220, 1), (58, 4))
    ]
    appraiser = task_appraiser(make_problem(tasks, costs=FakeCosts(launch_s=1e-3)), FREE)
    contiguous = [appraiser.appraise(groups) for groups in dp_starts(appraiser.table, 1)]
    best_s = best_of_all(appraiser)[0].seconds
    assert min(each.seconds for each in contiguous if each is not None) > 1.02 * best_s
    assert refined_partitions(appraiser)[0].seconds == best_s


def test_refinement_repeats_itself():
    runs = [refined_partitions(task_appraiser(draw_instance(4).problem, FREE)) for _ in range(2)]
    one, other = ([each.structure for each in found] for found in runs)
    assert one
    assert one == other


def tight(share: float) -> Appraiser:
    """A problem whose memory is that share of what the fastest partition needs."""
    loose = task_appraiser(make_problem(), FREE)
    needed = loose.table.needed_bytes(best_of_all(loose)[0].groups)
    return task_appraiser(make_problem(memory_bytes=int(share * needed)), FREE)


@pytest.mark.parametrize("share", [0.99, 0.95, 0.9, 0.85])
def test_where_memory_is_short_a_plan_is_found_if_there_is_one(share):
    refined, best = refined_partitions(tight(share)), best_of_all(tight(share))
    assert (not refined) == (not best)
    if best:
        assert refined[0].seconds <= 1.01 * best[0].seconds


def peak_bytes(appraiser: Appraiser, structures) -> int:
    """Of the structure that needs least, on its fullest stage."""
    memory = appraiser.table.problem.memory
    return min(max(m.total_bytes for m in memory(s, structure_schedule(s))) for s in structures)


def test_if_nothing_fits_the_structures_are_among_those_that_need_least():
    appraiser = tight(0.2)
    assert refined_partitions(appraiser) == []
    structures = appraiser.least_structures(set_partitions(len(MIXED)))
    with pytest.raises(SpecError, match="expected at least"):
        fitting(appraiser.table.problem, structures)
    assert peak_bytes(appraiser, structures) == min(
        peak_bytes(appraiser, appraiser.structures(groups)) for groups in set_partitions(len(MIXED))
    )


def test_effort_limits_what_is_priced_and_played():
    problem = make_problem([*MIXED, *ALIKE])
    appraiser = task_appraiser(problem, PlanOptions(carry=1))
    effort = Effort(orders=1, starts=1, neighbours=8, new_groups=40, appraisals=3, rounds=1)
    dp_starts(appraiser.table, 1)
    before = len(appraiser.table.masks())
    found = refined_partitions(appraiser, effort)
    # The partition that is being priced when the limit is met is still priced.
    assert len(appraiser.table.masks()) - before <= effort.new_groups + len(problem.data)
    assert found
    assert refined_partitions(appraiser, BRIEF)[0].seconds <= found[0].seconds


def test_refinement_starts_where_it_is_told_to():
    appraiser = task_appraiser(make_problem(), FREE)
    whole = ((1 << len(MIXED)) - 1,)
    effort = Effort(orders=1, starts=1, neighbours=1, new_groups=0, appraisals=1, rounds=1)
    (only,) = refined_partitions(appraiser, effort, starts=[whole])
    assert only.groups == whole
    assert set(appraiser.table.masks()) == {*whole}


def test_estimates_rank_groups_about_as_their_costs_do():
    appraiser = task_appraiser(make_problem([*MIXED, *ALIKE]), FREE)
    table = appraiser.table
    dp_starts(table, 1)
    estimate = CostEstimate(table)
    unpriced = [mask for mask in range(1, 1 << len(table.task_ids), 7) if mask not in table.masks()]
    for mask in unpriced[:40]:
        guessed = estimate(mask)
        assert guessed == pytest.approx(table[mask].cost_s, rel=0.35)
