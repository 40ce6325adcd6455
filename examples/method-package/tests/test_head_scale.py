"""The method beside LoRA in one hTask: planned, priced, run on two ranks, and equal to training alone."""

from __future__ import annotations

import pytest

from muxtune.cluster import load_cluster
from muxtune.costs import RooflineCosts
from muxtune.costs.roofline import RooflineCoefficients
from muxtune.model import load_model_spec
from muxtune.policies import PlanOptions, plan_workload
from muxtune.tasks import workload_from
from runtime import run_plan, validate_run

CPU = RooflineCoefficients(
    device="cpu",
    launch_s=1e-5,
    flops_per_s=5e10,
    bytes_per_s=1e10,
    overlap=1.5,
    link_latency_s=1e-4,
    link_bytes_per_s=2e9,
    error=float("nan"),
)
PEFTS = {
    "heads": {"method": "head_scale"},
    "few": {"method": "head_scale", "layers": [1]},
    "lora": {"method": "lora", "r": 4, "alpha": 8, "targets": ["all-linear"]},
}


@pytest.mark.parametrize(
    ("backbone", "mesh"),
    [("llama-tiny", {"pp": 2, "tp": 1}), ("gpt2-tiny", {"pp": 1, "tp": 2})],
    ids=["stages", "shards"],
)
def test_it_is_planned_run_and_exact(backbone, mesh, tmp_path):
    common = {
        "dataset": {"lengths": "sst2"},
        "global_batch_size": 2,
        "micro_batch_size": 2,
        "max_length": 16,
        "learning_rate": 1e-2,
        "steps": 3,
    }
    tasks = [{"id": name, "peft": peft, **common} for name, peft in PEFTS.items()]
    workload = workload_from({"tasks": tasks}, "workload", None)
    model, cluster = load_model_spec(backbone, "float64"), load_cluster("cpu-2")
    options = PlanOptions(partition="+".join(PEFTS), dp=1, **mesh)
    plan = plan_workload(workload, model, cluster, RooflineCosts(CPU, model), options=options)[0]
    assert plan.htasks[0].task_ids == tuple(PEFTS)
    run_plan(plan, tmp_path / "run")
    for task in validate_run(plan, tmp_path / "run").tasks:
        assert task.loss_difference < 1e-9
        assert task.adapter_error < 1e-9
