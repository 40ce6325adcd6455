"""Every task of a real run gets the losses and the adapter that it gets alone with Hugging Face peft.

One matrix of template x alignment x stages on one workload of very unlike tasks (by default cases in which
every two values meet, all of them in a full run), and a selection of it for other meshes of ranks, backbones,
dtypes, partitions and neighbours.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from tests.helpers import TINY_PRESETS
from tests.integration.differences import CREDIBLE, ROUNDED, Difference, compare_results, float32_limit
from tests.integration.pairwise import sampled_product
from tests.integration.parity import Case, read_adapter, read_losses
from tests.integration.parity_tasks import TASKS
from tests.integration.solo_peft import logits_with_adapter

# A run takes seconds. A rank that waits for ever is ended by run_plan, which the deadline interrupts.
pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]

MIXED = Case(
    backbone="llama",
    tasks=("rank1", "rank3", "rank8", "rank64", "brief", "aside"),
    partition="rank1+rank3+rank8+rank64+brief,aside",
)
GPT2 = Case(
    backbone="gpt2",
    tasks=("fused-qkv", "both-proj", "all-gpt2"),
    partition="fused-qkv+both-proj,all-gpt2",
)
OPT = Case(
    backbone="opt",
    tasks=("qv-fc1", "rank3", "out-fc2"),
    partition="qv-fc1+rank3,out-fc2",
)
CHUNK = {"alignment": "chunk", "chunk_tokens": 64}

MATRIX = [
    replace(MIXED, template=template, pp=pp, **alignment)
    for template, alignment, pp in sampled_product(
        ("flush", "continuous"), ({"alignment": "pad"}, {"alignment": "pack"}, CHUNK), (1, 2)
    )
]

MESHES = [
    replace(MIXED, tp=2, pp=1, template="flush"),
    replace(MIXED, tp=2, pp=2, orchestration="interleaved"),
    replace(MIXED, tp=2, pp=1, template="flush", orchestration="round-robin", **CHUNK),
    replace(MIXED, dp=2, pp=1),
    replace(MIXED, tp=2, pp=2),
    replace(MIXED, dp=2, pp=2, template="flush", alignment="pad"),
    replace(GPT2, tp=2, pp=1, alignment="pad"),
    replace(OPT, tp=2, dp=2, pp=1, template="flush"),
]

OTHERS = [
    # a stage that is neither first nor last
    replace(MIXED, pp=3, **CHUNK),
    # every task is an hTask
    replace(MIXED, partition=",".join(MIXED.tasks)),
    # every task has a copy of the backbone
    replace(MIXED, policy="nemo", partition=None, template="flush", alignment="pad"),
    replace(
        MIXED,
        backbone="llama-biases",
        tasks=("rank1", "rank3", "rank8"),
        partition="rank1+rank3,rank8",
        template="flush",
        pp=1,
        **CHUNK,
    ),
    GPT2,
    replace(GPT2, template="flush", alignment="pad", pp=1),
    OPT,
    replace(OPT, template="flush", pp=1, **CHUNK),
    replace(OPT, backbone="opt-gelu"),
]

SINGLE = [
    replace(MIXED, dtype="float32", **CHUNK),
    Case(
        backbone="llama-tiny",
        tasks=("bytes-short", "bytes-long"),
        partition="bytes-short+bytes-long",
        alignment="chunk",
        chunk_tokens=128,
        pp=1,
        dtype="float32",
    ),
    Case(
        backbone="gpt2-tiny",
        tasks=("bytes-short", "bytes-gpt2"),
        partition="bytes-short,bytes-gpt2",
        alignment="pad",
        dtype="float32",
    ),
    Case(
        backbone="opt-tiny",
        tasks=("bytes-short", "bytes-opt"),
        partition="bytes-short+bytes-opt",
        dtype="float32",
    ),
    replace(OPT, dtype="float32"),
    replace(OPT, backbone="opt-gelu", dtype="float32"),
]


@pytest.mark.parametrize("case", [*MATRIX, *MESHES, *OTHERS, *SINGLE], ids=str)
def test_losses_and_adapters_equal_those_of_peft_alone(bench, case):
    bench.assert_same(bench.compare(case), case)


def test_the_workload_is_as_unlike_as_it_claims(bench):
    plan = bench.plan(MIXED)
    mixed, aside = plan.htasks
    assert [task.peft.r for task in plan.htask_tasks(mixed.id)] == [1, 3, 8, 64, 4]
    assert {task.declared_microbatches for task in plan.htask_tasks(mixed.id)} == {1, 2, 4}
    assert (mixed.microbatches, aside.microbatches) == (4, 1)
    for task_id in ("rank8", "aside"):
        norms = bench.solo(task_id, "llama", "float64").gradient_norms
        assert any(norm > TASKS[task_id]["max_grad_norm"] for norm in norms)


def test_a_task_does_not_notice_its_neighbours(bench):
    tasks = ("wild", "rank3", "tiny", "brief", "rank8")
    other = replace(MIXED, tasks=tasks, partition="wild+rank3+tiny+brief,rank8", pp=1, **CHUNK)
    largest = max(float(tensor.abs().max()) for tensor in read_adapter(bench.run(other), "wild").values())
    assert largest > 10, "it goes as wrong as it should"
    differences = {}
    for task_id in ("rank3", "rank8", "brief"):
        ours, usual = (
            (read_losses(run_dir, task_id)[0], read_adapter(run_dir, task_id))
            for run_dir in (bench.run(other), bench.run(replace(MIXED, **CHUNK)))
        )
        initial = read_adapter(bench.run(other), task_id, "adapter-init")
        differences[task_id] = compare_results(*ours, *usual, initial)
    bench.assert_same(differences, other)


@pytest.mark.parametrize("case", [replace(MIXED, **CHUNK), replace(MIXED, tp=2), GPT2, OPT], ids=str)
def test_saved_adapters_are_those_that_peft_would_have_saved(bench, case):
    for task_id in case.tasks:
        solo = bench.solo(task_id, case.backbone, case.dtype)
        adapter = bench.run(case) / "tasks" / task_id / "adapter"
        task = bench.solo_task(task_id, case.backbone, case.dtype)
        logits = logits_with_adapter(task, adapter, solo.first_tokens)
        torch.testing.assert_close(logits, solo.first_logits, rtol=1e-9, atol=1e-9)
        ours, theirs = (
            json.loads((folder / "adapter_config.json").read_text())
            for folder in (adapter, solo.saved_adapter)
        )
        for config in (ours, theirs):
            config["target_modules"].sort()  # a set: PEFT writes it in any order
        assert ours == theirs


def test_a_peft_that_is_far_from_itself_is_no_measure_for_others(bench):
    """Long runs at high rates: rounding grows from step to step until two runs have little in common."""
    case = replace(MIXED, tasks=("steep",), partition="steep", dtype="float32")
    assert bench.spread(case, "steep").update > CREDIBLE.update
    with pytest.raises(AssertionError, match="from itself"):
        bench.limit(case, "steep")


@pytest.mark.parametrize("measure", ["loss", "update"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_bound_is_made_of_a_spread_that_is_no_number(measure, value):
    good = Difference(loss=1e-7, update=1e-6, element=1e-6)
    assert float32_limit("llama", good) == ROUNDED
    with pytest.raises(AssertionError, match="from itself"):
        float32_limit("llama", replace(good, **{measure: value}))


@pytest.mark.parametrize("preset", TINY_PRESETS)
def test_the_adapter_of_a_preset_names_it_as_its_base_model(bench, preset):
    case = next(case for case in SINGLE if case.backbone == preset)
    adapter = bench.run(case) / "tasks" / "bytes-short" / "adapter"
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == preset
