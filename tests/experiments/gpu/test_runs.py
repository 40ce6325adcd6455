"""The check of whole runs, with runs that are made up."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from experiments.gpu.runs import CASES, RunCase, check_run, describe_runs, largest_error, make_plan, run_cases
from muxtune.plan import Plan, check_plan
from runtime.tasks.adapter_files import WEIGHTS_FILE
from runtime.tasks.losses import StepLoss
from runtime.tasks.outputs import ADAPTER, ADAPTER_INIT, save_progress, task_folder


class Runs:
    """Executes a plan by writing what a run would; the device's numbers are off by these factors."""

    def __init__(self, *, loss: float = 1.0, update: float = 1.0) -> None:
        self.loss, self.update = loss, update
        self.devices: list[str] = []

    def __call__(self, plan: Plan, out_dir: Path, device: str):
        self.devices.append(device)
        loss, update = (self.loss, self.update) if device == "cuda" else (1.0, 1.0)
        for task in plan.tasks:
            for name, b in ((ADAPTER_INIT, 0.0), (ADAPTER, 0.1 * update)):
                folder = task_folder(out_dir, task.id) / name
                folder.mkdir(parents=True)
                save_file({"lora_B.weight": torch.full((4, 2), b)}, folder / WEIGHTS_FILE)
            losses = [StepLoss(step, 5.0 * loss, 10, 0.1) for step in range(task.steps)]
            save_progress(out_dir, task, losses, "finished")
        memory = [SimpleNamespace(peak_bytes=2**20 * n, device_peak_bytes=2**21 * n) for n in (1, 3, 2)]
        return SimpleNamespace(memory=memory, median_iteration_s=0.25)


def test_a_device_that_agrees_passes():
    runs = Runs(loss=1.0 + 1e-6, update=1.0 + 1e-4)
    result = check_run(RunCase(), device="cuda", run=runs)
    assert runs.devices == ["cuda", "cpu"]
    assert result.ok
    assert result.loss_error == pytest.approx(1e-6, rel=1e-3)
    assert result.update_error == pytest.approx(1e-4, rel=1e-2)
    assert (result.peak_bytes, result.counted_bytes) == (6 * 2**20, 3 * 2**20)
    section = describe_runs([result])
    assert section.ok
    assert section.title == "Runs against the CPU: all 1 plans agree"
    assert "| tp=1, pp=1, dp=1 |" in section.text


@pytest.mark.parametrize(
    "runs", [Runs(loss=1.001), Runs(update=1.1), Runs(loss=math.nan)], ids=["loss", "update", "nan"]
)
def test_a_device_that_differs_fails(runs):
    result = check_run(RunCase(), device="cuda", run=runs)
    assert not result.ok
    section = describe_runs([result, result])
    assert not section.ok
    assert "2 of 2 plans differ" in section.title
    assert "FAILS" in section.text


def test_a_nan_is_the_largest_error_wherever_it_stands():
    assert math.isnan(largest_error([(1.0, 1.0), (math.nan, 1.0), (9.0, 1.0)]))
    assert largest_error([(1.0, 2.0), (3.0, 2.0), (2.0, 2.0)]) == 0.5


def test_meshes_need_their_gpus():
    assert run_cases("cuda", 1) == [RunCase()]
    assert run_cases("cuda", 2) == list(CASES)
    assert run_cases("cpu", 0) == [RunCase()]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_plans_are_for_gpus_and_clip_some_gradients(case):
    plan = make_plan(case)
    check_plan(plan)
    assert plan.cluster.device.kind == "cuda"
    assert plan.parallelism.ranks == case.ranks
    assert {task.max_grad_norm is None for task in plan.tasks} == {True, False}
