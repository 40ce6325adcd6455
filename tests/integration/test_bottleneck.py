"""Bottleneck adapters beside LoRA in real processes: every task is where plain torch trains it alone."""

from __future__ import annotations

import pytest

from muxtune.model import load_model_spec
from muxtune.tasks import Workload
from runtime import run_plan, validate_run
from tests.helpers import make_plan, make_task, write_examples

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("quick_ranks")]

METHODS = {
    "serial": {"method": "bottleneck", "size": 6},
    "parallel": {
        "method": "bottleneck",
        "size": 4,
        "placement": "parallel",
        "scale": 4,
        "activation": "silu",
    },
    # nothing of it is on the first of two stages
    "late": {"method": "bottleneck", "size": 5, "blocks": ["mlp"], "layers": [3]},
}


@pytest.mark.parametrize(
    ("name", "mesh", "template"),
    [
        ("llama", {"pp": 2}, "continuous"),
        ("gpt2", {"pp": 1, "tp": 2}, "flush"),
        ("llama", {"pp": 1, "dp": 2}, "flush"),
    ],
    ids=["pp2", "tp2", "dp2"],
)
def test_every_task_is_where_it_gets_alone(name, mesh, template, tmp_path, hf_dirs):
    pefts = METHODS | {"lora": None}
    tasks = tuple(
        make_task(
            task_id,
            write_examples(tmp_path / f"{task_id}.jsonl", seed=seed),
            steps=20 if "pp" in mesh and mesh["pp"] == 2 else 6,
            max_grad_norm=0.05 if task_id == "late" else None,
            **({"targets": ["c_attn" if name == "gpt2" else "q_proj"]} if peft is None else {"peft": peft}),
        )
        for seed, (task_id, peft) in enumerate(pefts.items())
    )
    plan = make_plan(
        Workload(tasks=tasks),
        load_model_spec(str(hf_dirs[name]), "float64"),
        partition=[["serial", "parallel", "lora"], ["late"]],
        alignment="chunk",
        chunk_tokens=8,
        carry=2,
        template=template,
        **mesh,
    )
    run_plan(plan, tmp_path / "run")
    validation = validate_run(plan, tmp_path / "run")
    for task in validation.tasks:
        assert task.loss_difference < 1e-9, task
        assert task.adapter_error < 1e-9, task
        assert task.agreement == "within"
