"""A plan for GPUs, executed on processors."""

from __future__ import annotations

import pytest

from muxtune.cluster import load_cluster
from muxtune.model import PRESETS
from muxtune.plan import finish_plan
from muxtune.tasks import Workload
from runtime import RunOptions, run_plan, validate_run
from tests.helpers import make_plan, make_task, write_examples

pytestmark = pytest.mark.integration


def test_a_plan_for_gpus_can_be_tried_on_processors_and_its_times_are_not_compared(tmp_path):
    task = make_task("a", write_examples(tmp_path / "a.jsonl", seed=0), steps=2)
    plan = make_plan(Workload(tasks=(task,)), PRESETS["llama-tiny"], partition=[["a"]], pp=1)
    plan = finish_plan(plan.with_decisions(cluster=load_cluster("a100-1")))
    report = run_plan(plan, tmp_path / "run", RunOptions(device="cpu"))
    assert report.device == "cpu"
    (memory,) = report.memory
    assert memory.device_peak_bytes is None
    built = memory.backbone_bytes + memory.adapter_bytes
    assert memory.process_start_bytes + built < memory.process_peak_bytes
    validation = validate_run(plan, tmp_path / "run", solo_steps=0)
    assert not validation.comparable
