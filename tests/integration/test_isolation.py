"""One tenant that fails: it ends with a reason and what it had kept, and nobody else can tell."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import pytest
import torch

from muxtune.model import load_model_spec
from muxtune.plan import Plan, save_plan
from muxtune.tasks import Workload
from runtime import RunOptions, run_plan
from runtime.data.feed import load_plan_data
from runtime.reports.solo import SoloResult, train_solo
from runtime.reports.validate import update_error
from runtime.tasks.checkpoint import RunCheckpoints
from tests.helpers import make_boundless_model, make_plan, make_task, write_examples
from tests.integration.faults import BAD_STEP, CASES, OTHER_CASES, SAID, STEPS, Case, break_task, spoil
from tests.integration.parity import read_adapter, read_losses
from tests.integration.prepared import prepared_ranks

pytestmark = [pytest.mark.integration, pytest.mark.slow]

EVERY = 2
LIMIT = 1e-9


WORDS = SAID | {"huge": "the gradient norm is 1e+25, above abort_grad_norm (1000)"}
"""Float64 holds the square of that norm; the task's own limit does not allow it."""


def _plan(folder: Path, model: Path, case: Case, **changes: object) -> Plan:
    changes |= {
        "max_grad_norm": 0.05 if case.clips else None,
        "abort_grad_norm": 1000.0 if case.fault == "huge" else None,
    }
    tasks = tuple(
        make_task(name, write_examples(folder / f"{name}.jsonl", seed=i), steps=steps, **changes)
        for i, (name, steps) in enumerate([("a", STEPS), ("b", STEPS), ("c", 3), ("d", STEPS)])
    )
    return make_plan(
        Workload(tasks=tasks),
        load_model_spec(str(model), "float64"),
        partition=[["a", "b"], ["c"], ["d"]],
        template=case.template,
        pp=case.pp,
        tp=case.tp,
        dp=case.dp,
    )


@pytest.fixture(scope="module")
def solo(tmp_path_factory, hf_dirs) -> Callable[[str, bool], SoloResult]:
    """Each task trained alone, clipped or not."""
    folder = tmp_path_factory.mktemp("solo")

    @cache
    def run(task_id: str, clips: bool) -> SoloResult:
        plan = _plan(folder, hf_dirs["llama"], Case("flush", clips, rank=0))
        data = load_plan_data(plan)[task_id]
        return train_solo(plan.model, data, data.task.steps)

    return run


def _assert_as_alone(run_dir: Path, task_id: str, solo: SoloResult) -> None:
    losses, _ = read_losses(run_dir, task_id)
    assert losses == pytest.approx(solo.losses, rel=LIMIT)
    adapter = read_adapter(run_dir, task_id)
    assert update_error(adapter, solo.adapter, solo.initial_adapter) < LIMIT


@pytest.mark.parametrize("case", [*CASES, *OTHER_CASES], ids=str)
def test_a_task_that_fails_ends_alone(case, tmp_path, hf_dirs, solo):
    plan, run_dir = _plan(tmp_path, hf_dirs["llama"], case), tmp_path / "run"
    with prepared_ranks(partial(spoil if case in CASES else break_task, case=case)):
        report = run_plan(plan, run_dir, RunOptions(checkpoint_every=EVERY))
    states = {task.id: (task.state, task.steps_done) for task in report.tasks}
    assert states == {
        "a": ("finished", STEPS),
        "b": ("failed", BAD_STEP),
        "c": ("finished", 3),
        "d": ("finished", STEPS),
    }
    (reason,) = (task.reason for task in report.tasks if task.state == "failed")
    assert reason.startswith(f"task b, step {BAD_STEP}: {WORDS[case.fault]}")
    for task_id in "acd":
        _assert_as_alone(run_dir, task_id, solo(task_id, case.clips))
    alone = solo("b", case.clips)
    losses, _ = read_losses(run_dir, "b")
    assert losses == pytest.approx(alone.losses[:BAD_STEP], rel=LIMIT)

    kept = RunCheckpoints(run_dir, plan).last("b")
    assert (kept.steps_done, set(kept.optimizer_steps.values())) == (BAD_STEP, {BAD_STEP})
    adapter = read_adapter(run_dir, "b")
    assert all(torch.equal(adapter[key], tensor) for key, tensor in kept.tensors["adapter"].items())
    after_six = train_solo(plan.model, load_plan_data(plan)["b"], BAD_STEP)
    assert update_error(adapter, after_six.adapter, after_six.initial_adapter) < LIMIT


def test_a_run_goes_on_without_a_task_that_had_failed_and_says_so(tmp_path, hf_dirs, solo, command):
    case = Case("continuous", clips=False, rank=0, pp=2)
    plan, run_dir = _plan(tmp_path, hf_dirs["llama"], case), tmp_path / "run"
    with prepared_ranks(partial(spoil, case=case)):
        run_plan(plan, run_dir, RunOptions(checkpoint_every=1, steps=BAD_STEP + 2))
    before = read_adapter(run_dir, "b")
    save_plan(plan, tmp_path / "plan.json")
    lines = tmp_path / "progress.jsonl"
    options = ("--resume", "--json", "--json-lines", lines)
    result = command("run", tmp_path / "plan.json", "--out", run_dir, *options)
    assert result.code == 3
    assert "muxtune: task failed: task b, step 6: the gradient norm is inf" in result.err
    report = json.loads(result.out)
    assert report["first_step"] == BAD_STEP + 1
    assert [task["state"] for task in report["tasks"]] == ["finished", "failed", "finished", "finished"]
    shown = command("status", run_dir, "--json").json["tasks"]
    assert json.loads(lines.read_text().splitlines()[-1])["tasks"] == shown
    assert {task["id"]: (task["state"], task["steps_done"]) for task in shown} == {
        "a": ("finished", STEPS),
        "b": ("failed", BAD_STEP),
        "c": ("finished", 3),
        "d": ("finished", STEPS),
    }
    for task_id in "acd":
        _assert_as_alone(run_dir, task_id, solo(task_id, False))
    assert all(torch.equal(read_adapter(run_dir, "b")[key], tensor) for key, tensor in before.items())


@pytest.mark.parametrize("mesh", [{"pp": 1, "tp": 2}, {"pp": 2}], ids=str)
def test_a_run_whose_tasks_all_fail_ends_and_names_each(tmp_path, hf_dirs, mesh):
    model = make_boundless_model(tmp_path / "model", hf_dirs["llama"])
    case = Case("continuous", clips=False, rank=0, **mesh)
    plan, run_dir = _plan(tmp_path, model, case), tmp_path / "run"
    with prepared_ranks():
        report = run_plan(plan, run_dir)
    assert {task.id: (task.state, task.steps_done) for task in report.tasks} == dict.fromkeys(
        "abcd", ("failed", 0)
    )
    assert all("step 0: the loss is " in task.reason for task in report.tasks)
    assert not list(run_dir.glob("tasks/*/adapter"))
