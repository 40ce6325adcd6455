"""Useful operations, counted sequence by sequence; the MFU of a plan."""

from __future__ import annotations

import pytest

from muxtune.costs.flops import flops_per_token
from muxtune.costs.gpu import device_peaks, peak_flops_per_s
from muxtune.graph.operators import PHASES
from muxtune.planning.exact.utilization import useful_flops
from tests.sim.plans import MODEL, launched_plan, orchestrated_plan, problem


def counted(data):
    """Operations of all steps, over their number."""
    task, total = data.task, 0.0
    for step in range(task.steps):
        for example in data.batch(step):
            tokens = len(example.tokens)
            for phase in PHASES:
                flops = flops_per_token(
                    MODEL,
                    phase,
                    context_tokens=(tokens + 1) / 2,
                    peft=task.peft,
                    targets_per_token=example.target_tokens / tokens,
                )
                total += tokens * flops.total
    return total / task.steps


def test_useful_operations_are_those_of_every_sequence_by_itself():
    data = problem().data.values()
    assert useful_flops(MODEL, data) == pytest.approx(sum(map(counted, data)), rel=1e-9)


def test_the_mfu_is_the_useful_operations_over_what_the_ranks_could_do():
    plan = launched_plan("sequential")
    assert MODEL.dtype == "bfloat16"
    able = plan.parallelism.ranks * device_peaks("a40").tensor_flops_per_s * plan.predicted.iteration_s
    assert plan.predicted.mfu == pytest.approx(plan.derived.useful_flops / able, rel=1e-12)
    assert 0.05 < plan.predicted.mfu < 0.8


def test_a_shorter_iteration_has_a_higher_mfu():
    slow, fast = orchestrated_plan("sequential", pp=1), orchestrated_plan("interleaved", pp=1, contention=0.0)
    assert fast.predicted.iteration_s < slow.predicted.iteration_s
    ratio = slow.predicted.iteration_s / fast.predicted.iteration_s
    assert fast.predicted.mfu == pytest.approx(slow.predicted.mfu * ratio)


def test_what_no_data_sheet_says_is_unknown():
    assert peak_flops_per_s("cpu", "float32") is None
    assert peak_flops_per_s("a100", "float64") is None
    assert peak_flops_per_s("h100", "bfloat16") == 989.4e12
