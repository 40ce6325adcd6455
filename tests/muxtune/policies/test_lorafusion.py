"""LoRAFusion: head-tail groups, a token cap, a bubble rule."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muxtune.batches import measure_shape
from muxtune.planning.decisions.options import PlanOptions
from muxtune.planning.problem.assemble import structure_schedule
from muxtune.policies import POLICIES, plan_problem
from muxtune.policies.lorafusion import Packer, capacities, head_tail_groupings, obeys_bubble_rule
from muxtune.support.errors import SpecError
from tests.muxtune.planning.problems import MIXED, make_problem
from tests.muxtune.policies.gpus import gpu_problem
from tests.sampling import examples


def propose(problem, options=None):
    return POLICIES.get("lorafusion").propose(problem, options or PlanOptions())


@pytest.mark.parametrize("dp", [1, 2])
@pytest.mark.parametrize("group", [("t0",), ("t1", "t3"), ("t0", "t1", "t2", "t3", "t4")], ids=len)
def test_micro_batches_keep_to_the_capacity_and_are_as_few_as_possible(group, dp):
    problem = make_problem()
    packer = Packer(problem)
    members = [problem.data[task_id] for task_id in group]
    declared = math.ceil(max(data.task.declared_microbatches for data in members) / dp)
    for capacity in capacities(problem, dp):
        shape = packer.pack(group, capacity, dp).shape
        assert shape.tokens <= capacity
        assert shape.tokens == measure_shape(members, "pack", microbatches=shape.microbatches * dp).tokens
        assert shape.microbatches >= declared
        for fewer in range(declared, shape.microbatches):
            assert measure_shape(members, "pack", microbatches=fewer * dp).tokens > capacity


def test_capacities_are_powers_of_two_from_what_is_needed_to_the_longest_sequence():
    problem = make_problem()
    tried = capacities(problem, 1)
    everything = problem.shape(tuple(problem.data), "pack").tokens
    assert tried[0] / 2 < everything <= tried[0]
    assert all(a == 2 * b for a, b in pairwise(tried))
    assert tried[-1] >= problem.longest_sequence(tuple(problem.data))


def test_the_longest_is_paired_with_the_shortest():
    lengths = ("rte", 256), ("openbookqa", 128), ("sst2", 64), ("rte", 512), ("sst2", 16), ("openbookqa", 24)
    problem = make_problem([{"dataset": {"lengths": name}, "max_length": length} for name, length in lengths])
    mean = {task_id: data.lengths.mean() for task_id, data in problem.data.items()}
    ordered = sorted(mean, key=lambda task_id: -mean[task_id])
    singles, pairs, *larger = head_tail_groupings(problem, lambda group: 4, pp=2)
    assert [len(group) for group in singles] == [1] * 6
    assert pairs == [(ordered[0], ordered[5]), (ordered[1], ordered[4]), (ordered[2], ordered[3])]
    assert [len(groups) for groups in larger] == [2]


def test_no_pair_is_made_that_leaves_too_few_micro_batches_in_between():
    problem = make_problem(({},) * 4)
    # Two micro-batches for whatever group: three others must suffice for four stages, one pair of two not.
    groupings = head_tail_groupings(problem, lambda group: 2, pp=4)
    for groups in groupings:
        assert obeys_bubble_rule([2] * len(groups), 4)
    assert min(len(groups) for groups in groupings) == 3


def test_single_tasks_where_the_rule_cannot_hold():
    problem = make_problem(({},) * 4)
    assert head_tail_groupings(problem, lambda group: 1, pp=8) == [[("t0",), ("t1",), ("t2",), ("t3",)]]


@given(microbatches=st.lists(st.integers(1, 6), min_size=1, max_size=6), pp=st.integers(1, 6))
def test_the_rule_is_that_of_the_distance_between_steps(microbatches, pp):
    order = [group for group, count in enumerate(microbatches) for _ in range(count)] * 2
    total = sum(microbatches)
    gaps = []
    for group in range(len(microbatches)):
        last = max(i for i in range(total) if order[i] == group)
        first = min(i for i in range(total, 2 * total) if order[i] == group)
        gaps.append(first - last - 1)
    assert obeys_bubble_rule(microbatches, pp) == (min(gaps) >= pp - 1)


@settings(max_examples=examples(15))
@given(count=st.integers(4, 8), ranks=st.sampled_from([2, 3]))
def test_where_the_rule_holds_no_stage_waits_for_a_step(count, ranks):
    problem = make_problem([MIXED[i % len(MIXED)] for i in range(count)], ranks=ranks)
    for structure in propose(problem, PlanOptions(pp=ranks)):
        forwards = [a for a in structure_schedule(structure)[0] if a.kind == "F"]
        m = structure.microbatches
        assert obeys_bubble_rule(m, ranks)
        last: dict[tuple[int, int], int] = {}
        for position, action in enumerate(forwards):
            step = action.number // m[action.htask]
            before = last.get((action.htask, step - 1))
            assert before is None or position - before >= ranks
            last[action.htask, step] = position


def test_one_backbone_packed_and_continuous():
    plan = plan_problem(make_problem(), policy="lorafusion")[0]
    assert {htask.alignment for htask in plan.htasks} == {"pack"}
    assert {htask.instance for htask in plan.htasks} == {0}
    assert plan.template == "continuous"
    assert plan.buckets == tuple((h,) for h in range(len(plan.htasks)))


def test_other_alignments_are_refused():
    for options in (PlanOptions(alignment="pad"), PlanOptions(chunk_tokens=64)):
        with pytest.raises(SpecError, match=r"--alignment = .*: expected pack: lorafusion packs"):
            propose(make_problem(), options)


def test_it_is_not_slower_than_what_its_groups_allow():
    """Every mesh and capacity is tried, so at least as good as single tasks by turns in one pipeline."""
    problem = gpu_problem()
    best = plan_problem(problem, policy="lorafusion")[0].predicted.iteration_s
    fixed = PlanOptions(alignment="pack", template="continuous", tp=1, dp=1)
    by_turns = plan_problem(problem, policy="lorafusion", options=fixed)[0].predicted.iteration_s
    assert best <= by_turns * (1 + 1e-9)
