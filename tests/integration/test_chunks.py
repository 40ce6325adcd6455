"""Sequences that are cut into chunks get the losses and adapters that they get whole, alone, with peft.

Chunks of a sequence in one micro-batch, and spread over several, whose keys and values are carried on.
Template x stages x carry: by default cases in which every two values meet, all of them in a full run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

import pytest

from muxtune.batches import layout_step
from muxtune.plan import Plan
from runtime.data.feed import load_plan_data
from tests.integration.pairwise import sampled_product
from tests.integration.parity import Case, ParityBench

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
    backbone="llama",
    tasks=("long", "down", "text", "alone"),
    partition="long+down+text,alone",
    policy=None,
    alignment="chunk",
    chunk_tokens=CHUNK_TOKENS,
)
GPT2 = replace(LLAMA, backbone="gpt2", tasks=("gpt2-long", "gpt2-text"), partition="gpt2-long+gpt2-text")

MATRIX = [
    *(
        replace(LLAMA, template=template, pp=pp, carry=carry)
        for template, pp, carry in sampled_product(("flush", "continuous"), (1, 2), (1, 2, 4))
    ),
    *(replace(GPT2, template=template, pp=pp, carry=2) for template, pp in (("flush", 2), ("continuous", 1))),
    replace(GPT2, pp=2, carry=4),
    replace(LLAMA, pp=3, carry=2),
    replace(LLAMA, tp=2, pp=1, carry=2),
    replace(LLAMA, tp=2, pp=2, template="flush", carry=4),
    replace(LLAMA, dp=2, pp=1, carry=2),
    replace(LLAMA, dtype="float32", carry=4),
    replace(GPT2, dtype="float32"),
]


@pytest.fixture(scope="module")
def chunk_bench(tmp_path_factory):
    return ParityBench(tmp_path_factory.mktemp("chunks"), TASKS)


@pytest.fixture
def bench(chunk_bench, quick_ranks):
    return chunk_bench


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


@pytest.mark.parametrize("case", MATRIX, ids=str)
def test_losses_and_adapters_equal_those_of_peft_alone(bench, case: Case):
    bench.assert_same(bench.compare(case), case)


@pytest.mark.parametrize("case", [LLAMA, GPT2], ids=str)
def test_sequences_have_one_to_five_chunks_in_up_to_three_micro_batches(bench, case: Case):
    for carry, most in ((1, 1), (2, 2), (4, 3)):
        seen = set(chunks_per_sequence(bench.plan(replace(case, carry=carry))))
        assert {chunks for chunks, _ in seen} >= {1, 2, 3, 4, 5}
        assert {microbatches for _, microbatches in seen} == set(range(1, most + 1))
