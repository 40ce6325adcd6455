"""What is written of a run while it goes on."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import runtime.reports.live
from muxtune.model import PRESETS
from muxtune.plan import Plan
from muxtune.support.progress import PROGRESS, load_progress
from muxtune.tasks import Workload
from runtime.data.feed import Feed, load_plan_data
from runtime.reports.live import LiveProgress
from runtime.tasks.losses import StepLoss
from runtime.tasks.tenant import Tenant
from tests.helpers import make_plan, make_task, write_examples


@pytest.fixture
def plan(tmp_path) -> Plan:
    tasks = tuple(
        make_task(name, write_examples(tmp_path / f"{name}.jsonl", seed=i), steps=steps)
        for i, (name, steps) in enumerate([("a", 40), ("b", 40), ("c", 3)])
    )
    return make_plan(Workload(tasks=tasks), PRESETS["llama-tiny"], partition=[["a", "b", "c"]])


def _live(plan: Plan, run_dir, done: dict[str, int], *, first_step: int = 0) -> LiveProgress:
    """Tasks that have done so many steps, half a second each."""
    tenants = {task.id: Tenant(task, {"w": nn.Parameter(torch.zeros(1))}) for task in plan.tasks}
    losses = {
        task_id: [StepLoss(step, 2.0, 9, 0.5 * (step + 1)) for step in range(steps)]
        for task_id, steps in done.items()
    }
    if "b" in done and done["b"] < done["a"]:
        tenants["b"].fail(done["b"], "the loss is nan")
    feed = Feed(plan, load_plan_data(plan))
    return LiveProgress(run_dir, plan, feed, tenants, losses, first_step=first_step, steps=30)


def test_pace_share_and_end_are_those_of_the_last_steps(plan, tmp_path):
    data = load_plan_data(plan)
    live = _live(plan, tmp_path, {"a": 20, "b": 20, "c": 3})
    a, b, c = live.progress().tasks
    last = {i: sum(data[i].effective_tokens(step) for step in range(10, 20)) for i in "ab"}
    assert a.effective_tokens_per_s == pytest.approx(last["a"] / 5.0)
    assert a.share == pytest.approx(last["a"] / (last["a"] + last["b"]))
    assert a.share + b.share == pytest.approx(1.0)
    assert a.eta_s == pytest.approx(5.0)  # the run is limited to 30 steps
    assert (a.state, c.state, c.share, c.eta_s) == ("running", "finished", None, None)
    assert c.effective_tokens == sum(data["c"].effective_tokens(step) for step in range(3))


def test_a_failed_task_has_its_reason_and_no_pace(plan, tmp_path):
    a, b, _ = _live(plan, tmp_path, {"a": 20, "b": 6, "c": 3}).progress().tasks
    assert (b.state, b.steps_done, b.reason) == ("failed", 6, "the loss is nan")
    assert (b.effective_tokens_per_s, b.eta_s) == (None, None)
    assert a.share == 1.0


def test_tokens_are_those_of_this_start_and_one_step_has_no_pace(plan, tmp_path):
    data = load_plan_data(plan)
    a, *_ = _live(plan, tmp_path, {"a": 5, "b": 5, "c": 3}, first_step=4).progress().tasks
    assert a.effective_tokens == data["a"].effective_tokens(4)
    assert (a.steps_done, a.effective_tokens_per_s, a.eta_s) == (5, None, None)


def test_it_is_written_now_and_then(plan, tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(runtime.reports.live.time, "monotonic", lambda: clock[0])
    live = _live(plan, tmp_path, {"a": 5, "b": 5, "c": 3})
    live.write()
    assert len(load_progress(tmp_path).tasks) == 3
    (tmp_path / PROGRESS).unlink()
    clock[0] += 1.9
    live.write()
    assert not (tmp_path / PROGRESS).exists()
    live.write(now=True)
    (tmp_path / PROGRESS).unlink()
    clock[0] += 2.0
    live.write()
    assert (tmp_path / PROGRESS).exists()
