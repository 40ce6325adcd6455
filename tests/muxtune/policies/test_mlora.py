"""mLoRA: one micro-batch of a task in the pipeline, padded batches."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest

from muxtune.planning.decisions.options import PlanOptions
from muxtune.planning.problem.assemble import structure_schedule
from muxtune.policies import POLICIES, plan_problem
from muxtune.policies.mlora import batches_by_length
from tests.muxtune.planning.problems import MIXED, make_problem
from tests.muxtune.policies.gpus import gpu_problem


def propose(problem, options=None):
    return POLICIES.get("mlora").propose(problem, options or PlanOptions())


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("tasks", [MIXED, MIXED[:2], ({"global_batch_size": 32},)], ids=len)
def test_no_task_ever_has_two_micro_batches_on_their_way(ranks, tasks):
    for structure in propose(make_problem(tasks, ranks=ranks)):
        for actions in structure_schedule(structure):
            in_flight: Counter[int] = Counter()
            for action in actions:
                in_flight[action.htask] += {"F": 1, "B": -1, "STEP": 0}[action.kind]
                assert in_flight[action.htask] <= 1


def test_one_backbone_and_rows_as_long_as_the_longest_of_the_batch():
    problem = make_problem(ranks=2)
    for structure in propose(problem):
        assert {htask.instance for htask in structure.htasks} == {0}
        for htask in structure.htasks:
            longest = max(problem.data[task_id].task.max_length for task_id in htask.task_ids)
            assert (htask.shape.alignment, htask.shape.row_tokens) == ("pad", longest)


def test_every_number_of_batches_is_tried_and_neighbours_in_length_share_one():
    problem = make_problem()
    batches = batches_by_length(problem)
    assert [len(groups) for groups in batches] == [1, 2, 3, 4, 5]
    lengths = {task.id: task.max_length for task in problem.tasks}
    for groups in batches:
        assert sorted(task_id for group in groups for task_id in group) == sorted(lengths)
        longest = [max(lengths[task_id] for task_id in group) for group in groups]
        shortest = [min(lengths[task_id] for task_id in group) for group in groups]
        assert all(a <= b for a, b in zip(longest, shortest[1:], strict=False))
        assert max(map(len, groups)) - min(map(len, groups)) <= 1


def test_as_many_batches_as_stages_fill_the_pipeline():
    problem = make_problem(({},) * 6, ranks=2)
    options = PlanOptions(pp=2)
    alone = [s for s in propose(problem, options) if len(s.htasks) == 6]
    assert alone
    bubble = plan_problem(problem, policy="mlora", options=options)[0].predicted.bubble_fraction
    assert bubble < 0.05  # what transfers leave


def test_a_task_that_is_alone_waits_for_itself():
    problem = make_problem(({"global_batch_size": 32},), ranks=2)
    plan = plan_problem(problem, policy="mlora", options=PlanOptions(pp=2))[0]
    assert plan.predicted.bubble_fraction > 0.45  # of two stages one is always idle


def test_micro_batches_are_spread_over_the_iteration():
    """A task with few micro-batches does not use them up while one with many is kept waiting by itself."""
    problem = make_problem(({"global_batch_size": 16}, {}, {}), ranks=2)  # 4, 2 and 2 micro-batches
    structure = next(s for s in propose(problem) if len(s.htasks) == 3)
    forwards = [a.htask for a in structure_schedule(structure)[0] if a.kind == "F"][:8]
    busy = max(range(3), key=lambda h: structure.microbatches[h])
    places = [i for i, htask in enumerate(forwards) if htask == busy]
    assert [b - a for a, b in pairwise(places)] in ([2, 2, 2], [1, 3, 1], [3, 1, 3])


def test_it_fits_where_instances_do_not():
    problem = gpu_problem("testbed-a", "llama2-7b", 8)
    plan = plan_problem(problem, policy="mlora")[0]
    assert max(plan.predicted.peak_memory_bytes) <= problem.cluster.device.memory_bytes
