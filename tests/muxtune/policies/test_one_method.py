"""hTasks of one PEFT method each: the fusion of muxtune without mixing."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.helpers.fusion_instances import draw_instance
from muxtune.planning.decisions.options import PlanOptions
from muxtune.planning.decisions.partition_dp import set_partitions
from muxtune.planning.oracle.exhaustive import best_in_all_streams
from muxtune.planning.problem.assemble import structure_iteration_s
from muxtune.policies import POLICIES, plan_problem
from muxtune.policies.one_method import NAME
from muxtune.support.errors import SpecError
from tests.muxtune.planning.problems import MIXED, FakeCosts, make_problem

PEFTS = (
    {"method": "lora", "r": 8, "alpha": 16, "targets": ["q_proj", "v_proj"]},
    {"method": "ia3", "targets": ["all-linear"]},
    {"method": "bottleneck", "size": 16},
)


def problem_of(count: int, methods: int = 3, **changes):
    tasks = [MIXED[i % len(MIXED)] | {"peft": PEFTS[i % methods]} for i in range(count)]
    return make_problem(tasks, costs=FakeCosts(launch_s=1e-3), **changes)  # launches dominate: all fuse


def methods_of(problem, plan):
    return [{problem.data[t].task.peft.method for t in htask.task_ids} for htask in plan.htasks]


@pytest.mark.parametrize("count", [6, 11, 14], ids=["all partitions", "refined", "contiguous"])
def test_htasks_never_mix_methods_and_still_fuse(count):
    problem = problem_of(count)
    plan, free = plan_problem(problem, policy=NAME)[0], plan_problem(problem)[0]
    assert plan.policy == NAME
    assert all(len(each) == 1 for each in methods_of(problem, plan))
    assert len(plan.htasks) < count
    assert any(len(each) > 1 for each in methods_of(problem, free))
    assert free.predicted.iteration_s < plan.predicted.iteration_s


def test_tasks_of_one_method_get_the_plan_of_muxtune():
    problem = problem_of(5, methods=1)
    one, free = plan_problem(problem, policy=NAME)[0], plan_problem(problem)[0]
    assert one.htasks == free.htasks
    assert one.predicted.iteration_s == free.predicted.iteration_s
    assert len(problem.searches) == 1


def test_it_fits_where_only_the_leanest_partition_does():
    problem = problem_of(4)
    alone = plan_problem(problem, policy="temporal-only", options=PlanOptions(objective="memory"))[0]
    tight = problem_of(4, memory_bytes=max(alone.predicted.peak_memory_bytes))
    plan = plan_problem(tight, policy=NAME)[0]
    assert all(len(each) == 1 for each in methods_of(tight, plan))


@pytest.mark.parametrize("seed", range(8))
def test_it_is_within_1_percent_of_the_best_partition_without_mixing(seed):
    instance = draw_instance(seed, most_tasks=5, methods=True)
    options = PlanOptions(tp=1, pp=instance.pp, dp=instance.dp)
    best, (appraiser, *_) = best_in_all_streams(instance.problem, replace(options, one_method=True))
    methods = [instance.problem.data[t].task.peft.method for t in appraiser.table.task_ids]
    allowed = [
        groups
        for groups in set_partitions(len(methods))
        if all(len({m for bit, m in enumerate(methods) if mask >> bit & 1}) == 1 for mask in groups)
    ]
    assert sorted(appraiser.table.partitions()) == sorted(allowed)
    if not best:
        with pytest.raises(SpecError):
            POLICIES.get(NAME).propose(instance.problem, options)
        return
    found = POLICIES.get(NAME).propose(instance.problem, options)[0]
    assert structure_iteration_s(instance.problem, found) <= 1.01 * best[0].seconds


def test_a_fusion_by_hand_that_mixes_methods_is_refused_and_another_is_taken():
    problem = problem_of(3)
    with pytest.raises(SpecError, match=r"expected hTasks of one PEFT method; t0\+t1 has ia3 and lora"):
        plan_problem(problem, policy=NAME, options=PlanOptions(partition="t0+t1,t2"))
    plan = plan_problem(problem, policy=NAME, options=PlanOptions(partition="t0,t1,t2"))[0]
    assert len(plan.htasks) == 3
