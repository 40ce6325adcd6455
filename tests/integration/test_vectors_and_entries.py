"""IA3, BitFit, SHiRA and diff pruning in one hTask with LoRA: real ranks against each task alone.

Chunks of a sequence are spread over micro-batches, on two stages with two ranks each, and on two replicas.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

from runtime import validate_run
from tests.integration.parity import Case, ParityBench, read_adapter, read_losses

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]


def _task(peft: dict[str, object], seed: int, **fields: object) -> dict[str, object]:
    return {
        "dataset": {"path": "long.jsonl"},
        "peft": peft,
        "global_batch_size": 4,
        "micro_batch_size": 2,
        "max_length": 64,
        "steps": 20,
        "learning_rate": 5e-3,
        "seed": seed,
    } | fields


TASKS = {
    "vectors": _task(
        {"method": "ia3", "targets": ["k_proj", "v_proj", "fc1", "fc2"], "feedforward": ["fc2", "fc1"]}, 1
    ),
    "biases": _task({"method": "bitfit"}, 2, max_grad_norm=0.05),
    # nothing on the first stage
    "sparse": _task({"method": "shira", "r": 4, "targets": ["all-linear"], "layers": [2, 3]}, 3),
    "diff": _task({"method": "diff", "density": 0.05, "targets": ["q_proj", "fc2"]}, 4, weight_decay=0.1),
    "pairs": _task({"method": "lora", "r": 3, "alpha": 6, "targets": ["all-linear"]}, 5, steps=6),
}
SHARDED = Case(
    backbone="opt",
    tasks=tuple(TASKS),
    partition="+".join(TASKS),
    policy=None,
    alignment="chunk",
    chunk_tokens=12,
    carry=2,
    tp=2,
    pp=2,
)
REPLICAS = replace(SHARDED, tp=1, pp=1, dp=2, template="flush")


@pytest.fixture(scope="module")
def all_bench(tmp_path_factory) -> ParityBench:
    return ParityBench(tmp_path_factory.mktemp("vectors"), TASKS)


@pytest.fixture
def bench(all_bench, quick_ranks) -> ParityBench:
    return all_bench


@pytest.mark.parametrize("case", [SHARDED, REPLICAS], ids=str)
def test_losses_and_adapters_equal_those_of_each_task_alone(bench, case):
    report = validate_run(bench.plan(case), bench.run(case))
    assert len(report.tasks) == len(TASKS)
    for task in report.tasks:
        assert task.loss_difference <= 1e-9, task
        assert task.adapter_error <= 1e-7, task  # relative to the update, which is small
        assert task.agreement == "within", task
        assert task.last_loss < task.first_loss, task


@pytest.mark.parametrize("task_id", ["vectors", "sparse"])
def test_adapters_load_with_peft_and_give_other_logits_than_the_backbone(bench, task_id):
    folder = bench.run(SHARDED) / "tasks" / task_id / "adapter"
    plain = AutoModelForCausalLM.from_pretrained(bench.directory("opt"), dtype=torch.float64)
    loaded = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    ids = torch.arange(9)[None]
    with torch.no_grad():
        assert not torch.allclose(loaded(input_ids=ids).logits, plain(input_ids=ids).logits, rtol=1e-4)


def test_what_is_not_trained_is_as_it_was(bench):
    run_dir = bench.run(SHARDED)
    for task_id in ("sparse", "diff"):
        before, after = (read_adapter(run_dir, task_id, name) for name in ("adapter-init", "adapter"))
        places = [key for key in before if "indices" in key]
        assert places
        assert all(torch.equal(before[key], after[key]) for key in places)
        assert all(not torch.equal(before[key], after[key]) for key in before if key not in places)
    losses, _ = read_losses(run_dir, "sparse")
    assert len(losses) == TASKS["sparse"]["steps"]
