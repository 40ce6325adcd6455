"""All set partitions, the bounds that cut them, and the policy that tries them all."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.helpers.fusion_instances import draw_instance
from muxtune.planning.decisions.options import FREE, PlanOptions
from muxtune.planning.decisions.partition_dp import set_partitions
from muxtune.planning.oracle.exhaustive import best_of_all, task_appraiser
from muxtune.planning.problem.assemble import structure_iteration_s, structure_schedule
from muxtune.planning.problem.memory_limit import fits
from muxtune.planning.refinement.appraiser import Appraiser
from muxtune.policies import plan_problem
from muxtune.policies.exhaustive import MOST_TASKS
from muxtune.support.errors import SpecError
from tests.muxtune.planning.problems import MIXED, make_problem

ROUNDING = 1 - 1e-9
SMALL_SEEDS = range(900, 924)


def appraiser_of(seed: int, most_tasks: int = 4) -> Appraiser:
    instance = draw_instance(seed, most_tasks=most_tasks)
    return task_appraiser(instance.problem, PlanOptions(tp=1, pp=instance.pp, dp=1))


@pytest.mark.parametrize(("count", "bell"), [(1, 1), (2, 2), (3, 5), (5, 52), (8, 4140), (9, 21147)])
def test_there_are_as_many_partitions_as_bells_numbers_say(count, bell):
    partitions = list(set_partitions(count))
    assert len(set(partitions)) == len(partitions) == bell
    for groups in partitions[:: max(1, bell // 100)]:
        assert sum(groups) == (1 << count) - 1  # no bit twice, or there would be a carry
        assert sum(mask.bit_count() for mask in groups) == count
        assert list(groups) == sorted(groups)


@pytest.mark.parametrize("seed", SMALL_SEEDS)
def test_the_pruned_search_finds_what_trying_everything_finds(seed):
    appraiser = appraiser_of(seed)
    problem = appraiser.table.problem
    seconds = [
        structure_iteration_s(problem, structure)
        for groups in set_partitions(len(problem.data))
        for structure in appraiser.structures(groups)
        if fits(problem, structure)
    ]
    found = best_of_all(appraiser, keep=3)
    assert (not found) == (not seconds)
    if found:
        assert found[0].seconds == min(seconds)
        assert fits(problem, found[0].structure)
        assert [each.seconds for each in found] == sorted(each.seconds for each in found)


@pytest.mark.parametrize("seed", SMALL_SEEDS)
def test_no_schedule_is_below_the_bounds_of_its_partition(seed):
    appraiser = appraiser_of(seed)
    table, problem = appraiser.table, appraiser.table.problem
    for groups in set_partitions(len(problem.data)):
        whole_exceeds = table.surely_exceeds(groups) or any(table.exceeds_alone(mask) for mask in groups)
        for structure in appraiser.structures(groups):
            seconds = structure_iteration_s(problem, structure)
            assert seconds >= appraiser.bound_s(groups, [structure.template]) * ROUNDING
            if structure.htasks == table.htasks(groups):  # neither cut nor spread
                assert not (whole_exceeds and fits(problem, structure))


@pytest.mark.parametrize("seed", SMALL_SEEDS[:12])
def test_a_continuous_schedule_needs_no_less_than_one_that_drains(seed):
    """So a refusal need not look at it; and that a schedule does not fit, its first full moment says."""
    appraiser = appraiser_of(seed)
    problem = appraiser.table.problem
    for groups in set_partitions(len(problem.data)):
        for structure in appraiser.structures(groups):
            if structure.template != "continuous":
                continue
            flush = replace(structure, template="flush")
            (_, most), (stage, drained) = (
                problem.fullest_stage(each, structure_schedule(each)) for each in (structure, flush)
            )
            assert drained.total_bytes <= most.total_bytes
            assert problem.memory(flush, structure_schedule(flush))[stage] == drained
            for limit, exceeds in ((drained.total_bytes, False), (drained.total_bytes - 1, True)):
                _, met = problem.fullest_stage(flush, structure_schedule(flush), give_up_bytes=limit)
                assert (met.total_bytes > limit) == exceeds


def test_the_bound_of_a_single_htask_is_reached():
    """Alone, an hTask drains for its own step: its chain is its iteration, and the bound is exact at pp 1."""
    appraiser = task_appraiser(make_problem([{}], ranks=1), FREE)
    (best,) = best_of_all(appraiser)
    assert appraiser.bound_s(best.groups) == pytest.approx(best.seconds, rel=1e-9)


def test_masks_and_members_are_inverse():
    table = task_appraiser(make_problem(), FREE).table
    for mask in range(1, 1 << len(MIXED)):
        assert table.mask(table.members(mask)) == mask
        assert table[mask].choice.task_ids == table.members(mask)


def test_the_policy_is_at_least_as_fast_as_any_partition_asked_for():
    problem = make_problem()
    options = PlanOptions(pp=2)
    best = plan_problem(problem, policy="exhaustive", options=options)[0]
    appraiser = task_appraiser(problem, options)
    for groups in list(set_partitions(len(MIXED)))[::5]:
        appraised = appraiser.appraise(groups)
        assert appraised is not None
        assert best.predicted.iteration_s <= appraised.seconds / ROUNDING


def test_too_many_tasks_are_refused():
    problem = make_problem([{}] * (MOST_TASKS + 1))
    with pytest.raises(SpecError, match="number of tasks = 10: expected at most 9 for the policy exhaustive"):
        plan_problem(problem, policy="exhaustive")


def test_a_partition_that_is_fixed_leaves_nothing_to_try():
    with pytest.raises(SpecError, match=r"--partition = 't0\+t1,t2': .*exhaustive tries all partitions"):
        plan_problem(make_problem(), policy="exhaustive", options=PlanOptions(partition="t0+t1,t2"))


def test_if_nothing_fits_the_least_that_is_needed_is_named():
    with pytest.raises(SpecError, match=r"of fake = 976\.5 KiB: expected at least \d+\.\d MiB: stage \d"):
        plan_problem(make_problem(memory_bytes=1_000_000), policy="exhaustive")
