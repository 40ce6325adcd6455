"""Prefix, prompt and LoRA tenants in one hTask, run by real ranks and validated against peft alone."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from muxtune.batches import Alignment
from muxtune.cluster import load_cluster
from muxtune.model import PRESETS
from muxtune.planning.decisions.options import PlanOptions
from muxtune.policies import plan_workload
from muxtune.tasks import workload_from
from runtime import run_plan
from runtime.reports.validate import validate_run
from tests.helpers import make_plan, write_examples
from tests.integration.parity import read_adapter
from tests.muxtune.planning.problems import FakeCosts

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]

P = 6
METHODS = {
    "prefix": {"method": "prefix_tuning", "num_virtual_tokens": P},
    "lora": {"method": "lora", "r": 3, "alpha": 6, "targets": ["q_proj", "v_proj", "c_attn"]},
    "prompt": {"method": "prompt_tuning", "num_virtual_tokens": P},
}


@dataclass(frozen=True, slots=True)
class Case:
    backbone: str
    alignment: Alignment
    tp: int = 1
    pp: int = 1
    carry: int = 1


CASES = (Case("gpt2-tiny", "pad", pp=2), Case("llama-tiny", "chunk", tp=2, carry=2))


def make_workload(folder, backbone):
    targets = ["c_attn"] if backbone == "gpt2-tiny" else ["q_proj", "v_proj"]
    methods = METHODS | {"lora": METHODS["lora"] | {"targets": targets}}
    tasks = [
        {
            "id": name,
            "peft": peft,
            "dataset": {"path": str(write_examples(folder / f"{name}.jsonl", seed=seed, count=8))},
            "global_batch_size": 4,
            "micro_batch_size": 2,
            "max_length": 32,
            "learning_rate": 0.01,
            "steps": 3,
            "seed": seed,
            "max_grad_norm": 0.5 if name == "prefix" else None,
        }
        for seed, (name, peft) in enumerate(methods.items())
    ]
    return workload_from({"tasks": tasks}, "workload", folder)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_losses_and_adapters_equal_those_of_peft(case, tmp_path, quick_ranks):
    model = PRESETS[case.backbone].model_copy(update={"dtype": "float64", "layers": 2})
    plan = make_plan(
        make_workload(tmp_path, case.backbone),
        model,
        partition=[list(METHODS)],
        alignment=case.alignment,
        chunk_tokens=16 if case.alignment == "chunk" else None,
        carry=case.carry,
        tp=case.tp,
        pp=case.pp,
    )
    run_plan(plan, tmp_path / "run")
    report = validate_run(plan, tmp_path / "run")
    assert report.max_loss_difference is not None
    assert report.max_loss_difference < 1e-9
    for task in report.tasks:
        assert task.adapter_error is not None
        assert task.adapter_error < 1e-9
    for name in ("prefix", "prompt"):
        assert read_adapter(tmp_path / "run", name).keys() == {"prompt_embeddings"}


def test_a_policy_plans_them_together(tmp_path):
    workload = make_workload(tmp_path, "llama-tiny")
    options = PlanOptions(partition="prefix+lora+prompt", alignment="pad", pp=2)
    model, cluster = PRESETS["llama-tiny"], load_cluster("cpu-2")
    plan = plan_workload(workload, model, cluster, FakeCosts(), policy="muxtune", options=options)[0]
    (htask,) = plan.htasks
    # Rows are as long as the longest sequence with its virtual tokens: 32 and P.
    assert htask.tokens_per_microbatch == 3 * 2 * (32 + P)
