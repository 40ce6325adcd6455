"""LoRA's variants in real runs, on stages and on shards: losses and adapters are those of peft alone.

One task has what an input-split linear needs of all ranks: norms of whole rows, a bias that is added once.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import AutoPeftModelForCausalLM

from tests.integration.parity import ParityBench
from tests.integration.solo_peft import logits_of
from tests.integration.test_chunks import LLAMA
from tests.integration.test_chunks import TASKS as PLAIN

pytestmark = [pytest.mark.integration, pytest.mark.timeout(200)]

VARIANTS = {
    "long": {"use_dora": True, "bias": "lora_only", "targets": ["q_proj", "o_proj", "down_proj"]},
    "down": {"use_dora": True, "use_rslora": True, "dropout": 0.2},
    "alone": {
        "use_rslora": True,
        "rank_pattern": {"q_proj": 1},
        "targets": ["q_proj", "v_proj"],
        "bias": "all",
    },
}
TASKS = {
    name: fields | {"peft": fields["peft"] | VARIANTS.get(name, {}), "steps": 4, "max_grad_norm": 0.5}
    for name, fields in PLAIN.items()
}


@pytest.fixture(scope="module")
def variants_bench(tmp_path_factory) -> ParityBench:
    return ParityBench(tmp_path_factory.mktemp("variants"), TASKS)


@pytest.fixture
def bench(variants_bench, quick_ranks) -> ParityBench:
    return variants_bench


@pytest.mark.parametrize("mesh", [{"pp": 2}, {"pp": 1, "tp": 2}], ids=str)
def test_losses_and_adapters_equal_those_of_peft(bench, mesh):
    case = replace(LLAMA, backbone="llama-biases", **mesh)
    bench.assert_same(bench.compare(case), case)


def test_peft_loads_a_result_with_its_backbone_from_the_folder_alone(bench):
    case = replace(LLAMA, backbone="llama-biases", pp=2)
    run_dir = bench.run(case)
    for task_id in VARIANTS:
        solo = bench.solo(task_id, case.backbone, case.dtype)
        loaded = AutoPeftModelForCausalLM.from_pretrained(
            run_dir / "tasks" / task_id / "adapter", dtype=torch.float64
        )
        torch.testing.assert_close(
            logits_of(loaded, solo.first_tokens), solo.first_logits, rtol=1e-7, atol=1e-8
        )
