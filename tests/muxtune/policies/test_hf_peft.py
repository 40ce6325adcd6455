"""HF PEFT: instances, unfused adapters, GPipe."""

from __future__ import annotations

from itertools import groupby

import pytest

from muxtune.planning.decisions.options import PlanOptions
from muxtune.policies import POLICIES, plan_problem
from tests.muxtune.planning.problems import make_problem
from tests.muxtune.policies.gpus import gpu_problem

PIPELINE = PlanOptions(tp=1, pp=4, dp=1)


def structures(policy, problem, options=None):
    return POLICIES.get(policy).propose(problem, options or PlanOptions())


def test_every_task_is_an_instance_with_its_own_backbone_and_padded_to_its_own_length():
    problem = gpu_problem()
    plan = plan_problem(problem, policy="hf-peft")[0]
    assert [h.task_ids for h in plan.htasks] == [(task.id,) for task in problem.tasks]
    assert [h.instance for h in plan.htasks] == list(range(len(plan.htasks)))
    for htask in plan.htasks:
        task = plan.tasks_by_id[htask.task_ids[0]]
        rows = -(-task.global_batch_size // (htask.microbatches * plan.parallelism.dp))
        assert (htask.alignment, htask.tokens_per_microbatch) == ("pad", rows * task.max_length)


def test_its_adapters_are_not_fused_and_the_plan_says_so():
    problem = gpu_problem()
    assert plan_problem(problem, policy="hf-peft")[0].orchestration.adapters == "separate"
    assert plan_problem(problem, policy="nemo")[0].orchestration.adapters == "grouped"


def test_it_pays_for_more_kernels_than_nemo_and_for_nothing_else():
    """On the same mesh, in the same template, the difference is that of the adapters."""
    problem = gpu_problem()
    same = PlanOptions(tp=1, pp=4, dp=1, template="flush")
    (theirs,), (nemos,) = structures("hf-peft", problem, same), structures("nemo", problem, same)
    for htask, nemo in zip(theirs.htasks, nemos.htasks, strict=True):
        assert htask.shape == nemo.shape
        slow = problem.htask_times(htask, theirs.mesh, theirs.orchestration)
        fast = problem.htask_times(nemo, nemos.mesh, nemos.orchestration)
        assert all(a > b for a, b in zip(slow.fwd_s + slow.bwd_s, fast.fwd_s + fast.bwd_s, strict=True))
        assert slow.p2p_s == fast.p2p_s


def test_a_pipeline_plays_all_forwards_and_then_all_backwards():
    plan = plan_problem(gpu_problem(), policy="hf-peft", options=PIPELINE)[0]
    assert plan.template == "gpipe"
    for actions in plan.actions:
        turns = [
            (htask, [kind for kind, _ in groupby(action.kind for action in turn)])
            for htask, turn in groupby(actions, key=lambda action: action.htask)
        ]
        assert turns == [(htask, ["F", "B", "STEP"]) for htask in range(len(plan.htasks))]


def test_it_keeps_all_micro_batches_of_a_step():
    """GPipe's price: more memory than 1F1B from the same structure."""
    problem = gpu_problem()
    gpipe = plan_problem(problem, policy="hf-peft", options=PIPELINE)[0]
    one_f_one_b = PlanOptions(tp=1, pp=4, dp=1, template="flush")
    flush = plan_problem(problem, policy="hf-peft", options=one_f_one_b)[0]
    assert gpipe.predicted.peak_memory_bytes[-1] > flush.predicted.peak_memory_bytes[-1]
    assert max(gpipe.predicted.peak_memory_bytes) <= problem.cluster.device.memory_bytes


def test_on_one_stage_gradients_accumulate_one_micro_batch_after_the_other():
    plan = plan_problem(make_problem(ranks=1), policy="hf-peft")[0]
    assert plan.template == "flush"
    kinds = [action.kind for action in plan.actions[0] if action.kind != "STEP"]
    assert kinds == ["F", "B"] * (len(kinds) // 2)


@pytest.mark.parametrize("cluster", ["testbed-a", "testbed-c"])
def test_it_is_never_faster_than_nemo_in_a_pipeline(cluster):
    problem = gpu_problem(cluster)
    pp = PlanOptions(tp=1, pp=problem.cluster.ranks, dp=1)
    theirs, nemos = (plan_problem(problem, policy=p, options=pp)[0] for p in ("hf-peft", "nemo"))
    assert theirs.predicted.iteration_s > nemos.predicted.iteration_s
