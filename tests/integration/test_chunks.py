"""Sequences that are cut into chunks get the losses and adapters that they get whole, alone, with peft.

Chunks of a sequence in one micro-batch, and spread over several, whose keys and values are carried on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
import yaml

from muxtune.alignment import layout_step
from muxtune.model import load_model_spec
from muxtune.plan import Plan
from muxtune.workload import load_workload
from runtime import run_plan
from runtime.feed import load_plan_data
from tests.helpers import make_plan
from tests.integration.parity import (
    Case,
    ParityBench,
    assert_same,
    compare_with_solo,
)

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]


def _task(path: str, batch: tuple[int, int], r: int, *targets: str, **fields: object) -> dict[str, object]:
    return {
        "dataset": {"path": path},
        "peft": {"method": "lora", "r": r, "alpha": 2 * r, "targets": list(targets)},
        "global_batch_size": batch[0],
        "micro_batch_size": batch[1],
        "steps": 8,
        "learning_rate": 2e-3,
    } | fields


TASKS = {
    "long": _task("long.jsonl", (8, 2), 4, "all-linear", max_length=80, seed=1),
    # nothing trains keys and values of the first layer
    "down": _task("long.jsonl", (4, 2), 3, "down_proj", max_length=72, seed=2, max_grad_norm=0.05),
    # all tokens are targets, on both sides of every cut; leaves its hTask early
    "text": _task("plain.jsonl", (6, 3), 8, "q_proj", "v_proj", max_length=40, seed=3, steps=5, shuffle=True),
    "alone": _task("long.jsonl", (2, 1), 2, "k_proj", "gate_proj", max_length=64, seed=4, shuffle=True),
    "gpt2-long": _task("long.jsonl", (8, 2), 4, "all-linear", max_length=80, seed=5),
    "gpt2-text": _task("plain.jsonl", (4, 2), 3, "c_proj", max_length=40, seed=6, max_grad_norm=0.1),
}
CHUNK_TOKENS = 12

LLAMA = Case(
    backbone="llama", tasks=("long", "down", "text", "alone"), alignment="chunk", chunk_tokens=CHUNK_TOKENS
)
GPT2 = replace(LLAMA, backbone="gpt2", tasks=("gpt2-long", "gpt2-text"))
PARTITIONS = {"llama": [["long", "down", "text"], ["alone"]], "gpt2": [["gpt2-long", "gpt2-text"]]}

MATRIX = [
    *(
        (replace(LLAMA, template=template, pp=pp), carry)
        for template, pp, carry in product(("flush", "continuous"), (1, 2), (1, 2, 4))
    ),
    *((replace(GPT2, template=template, pp=pp), 2) for template, pp in (("flush", 2), ("continuous", 1))),
    (replace(GPT2, pp=2), 4),
    (replace(LLAMA, pp=3), 2),
    (replace(LLAMA, tp=2, pp=1), 2),
    (replace(LLAMA, tp=2, pp=2, template="flush"), 4),
    (replace(LLAMA, dp=2, pp=1), 2),
    (replace(LLAMA, dtype="float32"), 4),
    (replace(GPT2, dtype="float32"), 1),
]


class ChunkBench(ParityBench):
    """Plans cases with carry groups."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, TASKS)
        self.folder = folder

    def carried_plan(self, case: Case, carry: int) -> Plan:
        model_dir = str(self.directory(case.backbone))
        tasks = [{"id": name, **TASKS[name]} for name in case.tasks]
        file = self.folder / "chunks.yaml"
        file.write_text(yaml.safe_dump({"backbone": model_dir, "dtype": case.dtype, "tasks": tasks}))
        workload = load_workload(file)
        return make_plan(
            workload,
            load_model_spec(model_dir, workload.dtype),
            partition=PARTITIONS[case.backbone],
            alignment=case.alignment,
            chunk_tokens=case.chunk_tokens,
            template=case.template,
            pp=case.pp,
            tp=case.tp,
            dp=case.dp,
            carry=carry,
        )


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield ChunkBench(tmp_path_factory.mktemp("chunks"))
    torch.set_num_threads(threads)


def chunks_per_sequence(plan: Plan) -> Iterable[tuple[int, int]]:
    """Chunks and micro-batches of every sequence that the plan trains on."""
    data = load_plan_data(plan)
    for htask in plan.htasks:
        for step in range(5):
            lengths = [data[task_id].batch_lengths(step) for task_id in htask.task_ids]
            chunks: Counter[tuple[int, int]] = Counter()
            microbatches: Counter[tuple[int, int]] = Counter()
            for layout in layout_step(plan.shape(htask.id), lengths):
                keys = [(segment.task, segment.sequence) for segment in layout.segments]
                chunks.update(keys)
                microbatches.update(set(keys))
            yield from ((chunks[key], microbatches[key]) for key in chunks)


@pytest.mark.parametrize(("case", "carry"), MATRIX, ids=str)
def test_losses_and_adapters_equal_those_of_peft_alone(bench, tmp_path: Path, case: Case, carry: int):
    run_plan(bench.carried_plan(case, carry), tmp_path / "run")
    differences = {
        task_id: compare_with_solo(tmp_path / "run", task_id, bench.solo(task_id, case.backbone, case.dtype))
        for task_id in case.tasks
    }
    assert_same(differences, case)


@pytest.mark.parametrize("backbone", ["llama", "gpt2"])
def test_sequences_have_one_to_five_chunks_in_up_to_three_micro_batches(bench, backbone: str):
    case = LLAMA if backbone == "llama" else GPT2
    for carry, most in ((1, 1), (2, 2), (4, 3)):
        seen = set(chunks_per_sequence(bench.carried_plan(case, carry)))
        assert {chunks for chunks, _ in seen} >= {1, 2, 3, 4, 5}
        assert {microbatches for _, microbatches in seen} == set(range(1, most + 1))
