"""Checkpoints hold every task at the same step, and only complete ones count."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from muxtune.plan import extend_schedule
from muxtune.tasks import PeftTask
from runtime.tasks.checkpoint import CheckpointWriter, RunCheckpoints
from runtime.tasks.checkpoint_files import complete_steps
from runtime.tasks.gradients import squared_gradient_norms
from runtime.tasks.losses import StepLoss
from runtime.tasks.tenant import Tenant, is_finite
from runtime.tasks.verdict import NonFiniteError
from tests.plans import make_plan


def _tenants(plan) -> dict[str, Tenant]:
    return {task.id: Tenant(task, {"w": nn.Parameter(torch.zeros(3))}) for task in plan.tasks}


def _play(plan, tenants, writer, losses, *, steps: int, first: int = 0) -> None:
    """Step the tenants in the order of the schedule, with gradients that differ in every step."""
    for action in extend_schedule(plan, steps, first=first)[0]:
        if action.kind == "STEP":
            for task_id in plan.htasks[action.htask].task_ids:
                tenants[task_id].parameters["w"].grad = torch.full((3,), float(action.number + 1))
                tenants[task_id].step(action.number, squared_gradient_norms([tenants[task_id]])[0].sqrt())
                losses[task_id].append(StepLoss(action.number, 1.0 / (action.number + 1), 5, 0.1))
            writer.after_step(action.htask, action.number)


def _writer(folder, plan, tenants, losses, *, steps: int, strict: bool = False) -> CheckpointWriter:
    return CheckpointWriter(
        folder, 0, plan=plan, tenants=tenants, losses=losses, every=2, steps=steps, strict=strict
    )


@pytest.mark.parametrize("template", ["flush", "continuous"])
def test_a_restored_run_ends_bit_by_bit_like_the_uninterrupted_one(tmp_path, template):
    plan = make_plan(template=template, pp=1)
    whole, losses = _tenants(plan), {task.id: [] for task in plan.tasks}
    _play(plan, whole, _writer(tmp_path, plan, whole, losses, steps=4), losses, steps=4)
    checkpoints = RunCheckpoints(tmp_path, plan)
    assert checkpoints.newest == 2  # none at the end: the results themselves are written

    again = _tenants(plan)
    for task_id, tenant in again.items():
        state = checkpoints.load(task_id, 2)
        assert [loss.step for loss in state.losses] == [0, 1]
        tenant.restore(state.part_of(tenant))
    _play(plan, again, _writer(tmp_path, plan, again, losses, steps=4), losses, steps=4, first=2)
    for task_id, tenant in whole.items():
        assert torch.equal(again[task_id].parameters["w"], tenant.parameters["w"])


def test_a_run_goes_on_where_every_task_has_all_its_parts(tmp_path):
    plan = make_plan(pp=1)
    tasks = tuple(task.model_copy(update={"steps": 9}) for task in plan.tasks)
    plan = plan.with_decisions(tasks=tasks)
    tenants, losses = _tenants(plan), {task.id: [] for task in tasks}
    _play(plan, tenants, _writer(tmp_path, plan, tenants, losses, steps=9), losses, steps=7)
    checkpoints = RunCheckpoints(tmp_path, plan)
    assert checkpoints.iterations() == [4, 6]
    newest = tmp_path / "tasks" / tasks[0].id / "checkpoints" / "step-000006"
    (newest / "part-0-of-1.safetensors").rename(newest / "part-0-of-2.safetensors")
    assert checkpoints.iterations() == [4]
    assert RunCheckpoints(tmp_path / "nothing", plan).newest is None


def test_a_task_that_ends_early_keeps_its_last_state(tmp_path):
    """It has no more steps, so the run goes on from iterations after its own last one."""
    plan = make_plan(pp=1)
    first, *others = (task.model_copy(update={"steps": 9}) for task in plan.tasks)
    plan = plan.with_decisions(tasks=(first.model_copy(update={"steps": 3}), *others))
    tenants, losses = _tenants(plan), {task.id: [] for task in plan.tasks}
    _play(plan, tenants, _writer(tmp_path, plan, tenants, losses, steps=9), losses, steps=9)
    assert complete_steps(tmp_path / "tasks" / first.id / "checkpoints") == [2, 3]
    checkpoints = RunCheckpoints(tmp_path, plan)
    assert checkpoints.iterations() == [6, 8]
    assert checkpoints.load(first.id, 8).steps_done == 3


def test_older_checkpoints_go_when_two_newer_ones_are_complete(tmp_path):
    plan = make_plan(pp=1)
    tasks = tuple(task.model_copy(update={"steps": 7}) for task in plan.tasks)
    plan = plan.with_decisions(tasks=tasks)
    tenants, losses = _tenants(plan), {task.id: [] for task in tasks}
    _play(plan, tenants, _writer(tmp_path, plan, tenants, losses, steps=7), losses, steps=7)
    for task in tasks:
        folder = tmp_path / "tasks" / task.id / "checkpoints"
        assert sorted(path.name for path in folder.iterdir()) == ["step-000004", "step-000006"]


def test_the_gradient_is_clipped_as_torch_does_it():
    fields = make_plan().tasks[0].model_dump() | {"max_grad_norm": 0.5}
    task = PeftTask.model_validate(fields)
    gradient = torch.tensor([0.3, -2.0, 1.0], dtype=torch.float64)
    ours, reference = (nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2))
    tenant = Tenant(task, {"w": ours})
    ours.grad, reference.grad = gradient.clone(), gradient.clone()
    tenant.step(0, float(squared_gradient_norms([tenant])[0]) ** 0.5)
    torch.nn.utils.clip_grad_norm_([reference], 0.5)
    torch.optim.AdamW([reference], lr=task.learning_rate, weight_decay=0.0).step()
    torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("limit", [None, 1.0])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_a_gradient_that_is_not_finite_changes_neither_adapter_nor_optimizer(value, limit):
    """A NaN norm is no reason to step without clipping."""
    task = PeftTask.model_validate(make_plan().tasks[0].model_dump() | {"max_grad_norm": limit})
    tenant = Tenant(task, {"w": nn.Parameter(torch.ones(3))})
    for step, gradient in enumerate([torch.full((3,), 0.1), torch.tensor([0.1, value, 0.1])]):
        before = tenant.snapshot()
        tenant.parameters["w"].grad = gradient
        tenant.step(step, squared_gradient_norms([tenant])[0].sqrt())
    after = tenant.snapshot()
    assert torch.equal(after["adapter"]["w"], before["adapter"]["w"])
    assert all(torch.equal(after["optimizer"][name]["w"], before["optimizer"][name]["w"]) for name in
               ("step", "exp_avg", "exp_avg_sq"))  # fmt: skip


@pytest.mark.parametrize(("limit", "refused"), [(None, True), (1.0, False), (1e30, True)])
def test_a_gradient_whose_square_would_overflow_the_second_moment_is_refused_unless_clipped(limit, refused):
    task = PeftTask.model_validate(make_plan().tasks[0].model_dump() | {"max_grad_norm": limit})
    tenant = Tenant(task, {"w": nn.Parameter(torch.ones(3))})
    tenant.parameters["w"].grad = torch.full((3,), 1e25)
    norm = squared_gradient_norms([tenant])[0].sqrt()
    assert (not norm.square() <= tenant.most_squared_norm) == refused
    tenant.step(0, norm)
    assert tenant.is_finite()
    assert torch.equal(tenant.parameters["w"], torch.ones(3)) == refused


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("part", ["adapter", "exp_avg_sq"])
@pytest.mark.parametrize("template", ["flush", "continuous"])
def test_a_state_that_is_not_finite_is_never_written_and_removes_nothing(tmp_path, template, part, strict):
    plan = make_plan(template=template, pp=1)
    tasks = tuple(task.model_copy(update={"steps": 9}) for task in plan.tasks)
    plan = plan.with_decisions(tasks=tasks)
    tenants, losses = _tenants(plan), {task.id: [] for task in tasks}
    writer = _writer(tmp_path, plan, tenants, losses, steps=9, strict=strict)
    _play(plan, tenants, writer, losses, steps=4)
    _play(plan, tenants, writer, losses, steps=5, first=4)
    parameter = tenants[tasks[-1].id].parameters["w"]
    state = tenants[tasks[-1].id].optimizer.state[parameter]
    (parameter.data if part == "adapter" else state[part])[1] = float("inf")
    message = rf"task {tasks[-1].id}, step 5: adapter or optimizer state is"
    with pytest.raises(NonFiniteError, match=message) if strict else nullcontext():
        _play(plan, tenants, writer, losses, steps=6, first=5)
    checkpoints = RunCheckpoints(tmp_path, plan)
    assert checkpoints.iterations() == [2, 4]
    for iteration in (2, 4):
        for task_id, tenant in tenants.items():
            assert is_finite(checkpoints.load(task_id, iteration).part_of(tenant))
