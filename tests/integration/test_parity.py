"""Every task of a real run gets the losses and the adapter that it gets alone with Hugging Face peft.

One matrix of template x alignment x stages on one workload of very unlike tasks, and a selection of it for
other meshes of ranks, backbones, dtypes, partitions and neighbours.
"""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product

import pytest
import torch

from tests.helpers import TINY_PRESETS
from tests.integration.parity import (
    Case,
    ParityBench,
    assert_same,
    compare_results,
    read_adapter,
    read_losses,
)
from tests.integration.solo_peft import logits_with_adapter

# A run takes seconds. A rank that waits for ever is ended by run_plan, which the deadline interrupts.
pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]


def _lora(r: int, alpha: float, *targets: str) -> dict[str, object]:
    return {"method": "lora", "r": r, "alpha": alpha, "targets": list(targets)}


def _task(path: str, batch: tuple[int, int], peft: dict[str, object], **fields: object) -> dict[str, object]:
    defaults = {
        "global_batch_size": batch[0],
        "micro_batch_size": batch[1],
        "steps": 20,
        "learning_rate": 2e-3,
    }
    return defaults | {"dataset": {"path": path}, "peft": peft} | fields


TASKS = {
    # prompts that are cut on the left; two micro-batches of four
    "rank1": _task("long.jsonl", (8, 4), _lora(1, 2, "q_proj", "v_proj"), max_length=24, seed=1),
    # ten examples: 80 sequences are eight epochs, and every batch takes from two of them
    "rank3": _task(
        "few.jsonl", (4, 1), _lora(3, 7, "all-linear"), max_length=48, seed=2**40 + 5, shuffle=True
    ),
    # all tokens are targets; gradients are clipped in every step
    "rank8": _task(
        "plain.jsonl",
        (4, 2),
        _lora(8, 16, "gate_proj", "up_proj", "down_proj"),
        max_length=40,
        seed=3,
        max_grad_norm=0.05,
    ),
    # one micro-batch alone: its two sequences leave two of its neighbours' four micro-batches empty
    "rank64": _task(
        "long.jsonl",
        (2, 2),
        _lora(64, 32, "k_proj", "o_proj"),
        max_length=64,
        seed=4,
        learning_rate=5e-3,
        weight_decay=0.1,
        lr_schedule="linear",
        warmup_steps=4,
    ),
    # leaves its hTask after 8 of 20 steps
    "brief": _task(
        "short.jsonl",
        (6, 3),
        _lora(4, 8, "self_attn.q_proj", "down_proj"),
        max_length=32,
        seed=5,
        steps=8,
        lr_schedule="cosine",
        shuffle=True,
    ),
    # an hTask that leaves the rotation; clipped, scheduled and decayed at once
    "aside": _task(
        "short.jsonl",
        (4, 4),
        _lora(2, 4, "all-linear"),
        max_length=32,
        seed=6,
        steps=14,
        max_grad_norm=0.2,
        weight_decay=0.05,
        lr_schedule="cosine",
        warmup_steps=3,
    ),
    # neighbours that no one would want: exploding, and as different from the others as can be
    "wild": _task(
        "long.jsonl", (8, 2), _lora(16, 512, "all-linear"), max_length=64, seed=7, learning_rate=10.0
    ),
    "tiny": _task("plain.jsonl", (1, 1), _lora(5, 1, "v_proj"), max_length=40, seed=8, learning_rate=1e-6),
    # for GPT-2, whose linears have other names
    "fused-qkv": _task(
        "short.jsonl", (4, 2), _lora(8, 16, "c_attn"), max_length=32, seed=9, max_grad_norm=0.1
    ),
    "both-proj": _task("long.jsonl", (6, 2), _lora(3, 6, "c_proj"), max_length=64, seed=10, shuffle=True),
    "all-gpt2": _task(
        "plain.jsonl", (2, 1), _lora(16, 16, "all-linear"), max_length=40, seed=11, steps=8, weight_decay=0.1
    ),
    # for OPT, whose linears have names of their own
    "qv-fc1": _task(
        "short.jsonl",
        (4, 2),
        _lora(8, 16, "q_proj", "v_proj", "fc1"),
        max_length=32,
        seed=15,
        max_grad_norm=0.1,
    ),
    "out-fc2": _task(
        "long.jsonl", (6, 2), _lora(3, 6, "self_attn.out_proj", "fc2"), max_length=64, seed=16, shuffle=True
    ),
    # bytes are many tokens
    "bytes-short": _task("short.jsonl", (4, 2), _lora(8, 16, "all-linear"), max_length=40, seed=12),
    "bytes-long": _task(
        "long.jsonl", (2, 1), _lora(4, 8, "mlp.down_proj", "q_proj"), max_length=72, seed=13, shuffle=True
    ),
    "bytes-gpt2": _task(
        "long.jsonl", (2, 1), _lora(4, 8, "mlp.c_proj"), max_length=72, seed=14, shuffle=True
    ),
    "bytes-opt": _task("long.jsonl", (2, 1), _lora(4, 8, "v_proj", "fc1"), max_length=72, seed=17),
}

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
    for template, alignment, pp in product(
        ("flush", "continuous"), ({"alignment": "pad"}, {"alignment": "pack"}, CHUNK), (1, 2)
    )
]

MESHES = [
    replace(MIXED, tp=2, pp=1, template="flush"),
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


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on tensors this small, more threads only wait for each other
    yield ParityBench(tmp_path_factory.mktemp("parity"), TASKS)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("case", [*MATRIX, *MESHES, *OTHERS, *SINGLE], ids=str)
def test_losses_and_adapters_equal_those_of_peft_alone(bench, case):
    assert_same(bench.compare(case), case)


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
    assert_same(differences, other)


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


@pytest.mark.parametrize("preset", TINY_PRESETS)
def test_the_adapter_of_a_preset_names_it_as_its_base_model(bench, preset):
    case = next(case for case in SINGLE if case.backbone == preset)
    adapter = bench.run(case) / "tasks" / "bytes-short" / "adapter"
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == preset
