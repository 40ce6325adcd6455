"""A checkpoint's file that is not what was written, or not of this run, is named; the one before is used."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from muxtune.support.errors import SpecError
from runtime.tasks.checkpoint_files import (
    DamagedCheckpointError,
    Owner,
    RankState,
    clear_newer,
    complete_checkpoints,
    load_rank_state,
    save_rank_state,
    whole_checkpoint,
)
from runtime.tasks.gradients import squared_gradient_norms
from runtime.tasks.tenant import Tenant
from tests.plans import make_plan

PLAN = make_plan(pp=2)
OWNER = Owner.of(PLAN)
RANKS = 2


def _tenant(task, rank: int, value: float) -> Tenant:
    tenant = Tenant(task, {f"layer.{rank}": nn.Parameter(torch.full((2, 3), float(value)))})
    tenant.parameters[f"layer.{rank}"].grad = torch.full((2, 3), 0.5)
    tenant.step(0, squared_gradient_norms([tenant])[0].sqrt())
    return tenant


def _save(folder, step: int, *, plan: str = OWNER.plan, tasks=PLAN.tasks) -> None:
    for rank in range(RANKS):
        snapshots = {task.id: _tenant(task, rank, step + i).snapshot() for i, task in enumerate(tasks)}
        losses = {task.id: [(0, 1 / 3, 5, 0.25)] for task in tasks} if rank else {}
        save_rank_state(folder, RankState(tenants=snapshots, losses=losses), plan=plan, step=step, rank=rank)


@pytest.fixture
def folder(tmp_path):
    """Two checkpoints of two ranks."""
    for step in (5, 10):
        _save(tmp_path, step)
    return tmp_path


def _newest(folder, rank: int = 1, suffix: str = ".safetensors"):
    return folder / "step-000010" / f"rank-{rank}{suffix}"


def _flip(path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def _rewrite(folder, change) -> None:
    """Other tensors under the same header, as a tool would write them that knows nothing of checksums."""
    path = _newest(folder)
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(change(tensors), path, metadata)


def _without_a_tenant(tensors):
    return {name: t for name, t in tensors.items() if not name.startswith(f"{PLAN.tasks[0].id}/")}


def _swapped(tensors):
    a, b = (task.id for task in PLAN.tasks[:2])
    other = {a: b, b: a}
    parts = {name: name.split("/", 1) for name in tensors}
    return {f"{other.get(task, task)}/{rest}": tensors[name] for name, (task, rest) in parts.items()}


def _foreign_shapes(tensors):
    return {name: torch.cat([t, t]) if t.ndim else t for name, t in tensors.items()}


DAMAGE = {
    "a bit of a tensor": lambda folder: _flip(_newest(folder), -5),
    "a bit of the header": lambda folder: _flip(_newest(folder), 20),
    "a bit of the checksum": lambda folder: _flip(_newest(folder, suffix=".sha256"), 3),
    "cut short": lambda folder: _newest(folder).write_bytes(_newest(folder).read_bytes()[:-8]),
    "empty": lambda folder: _newest(folder).write_bytes(b""),
    "gone": lambda folder: _newest(folder).unlink(),
    "a folder": lambda folder: (_newest(folder).unlink(), _newest(folder).mkdir()),
    "tenant missing": lambda folder: _rewrite(folder, _without_a_tenant),
    "tenants swapped": lambda folder: _rewrite(folder, _swapped),
    "foreign shapes": lambda folder: _rewrite(folder, _foreign_shapes),
    "other rank": lambda folder: [
        shutil.copy(_newest(folder, 0, suffix), _newest(folder, 1, suffix))
        for suffix in (".safetensors", ".sha256")
    ],
    "other step": lambda folder: [
        shutil.copy(folder / "step-000005" / f"rank-1{suffix}", _newest(folder, 1, suffix))
        for suffix in (".safetensors", ".sha256")
    ],
    "other plan": lambda folder: _save(folder, 10, plan="another"),
    "other tasks": lambda folder: _save(folder, 10, tasks=PLAN.tasks[1:]),
    "earlier format": lambda folder: _newest(folder, suffix=".pt").write_bytes(b"pickle"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_the_checkpoint_before_a_damaged_one_is_used_and_the_damage_is_named(folder, damage):
    assert whole_checkpoint(folder, OWNER) == (10, [])
    damage(folder)
    step, (complaint,) = whole_checkpoint(folder, OWNER)
    assert step == 5
    assert "step-000010" in complaint
    assert "\n" not in complaint


def test_what_was_written_comes_back_bit_by_bit(folder):
    state = load_rank_state(folder, 10, 1)
    for i, task in enumerate(PLAN.tasks):
        expected, found = _tenant(task, 1, 10 + i), Tenant(task, {"layer.1": nn.Parameter(torch.zeros(2, 3))})
        found.restore(state["tenants"][task.id])
        for tenant in (expected, found):
            tenant.parameters["layer.1"].grad = torch.full((2, 3), 0.25)
            tenant.step(1, squared_gradient_norms([tenant])[0].sqrt())
        assert torch.equal(found.parameters["layer.1"], expected.parameters["layer.1"])
        assert state["losses"][task.id] == [(0, 1 / 3, 5, 0.25)]


def test_a_rank_reads_no_damaged_file(folder):
    _flip(_newest(folder), -5)
    with pytest.raises(DamagedCheckpointError, match=r"rank-1\.safetensors: damaged, its SHA-256 is not"):
        load_rank_state(folder, 10, 1)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"layer.1": torch.zeros(3, 2)}, r"adapter layer\.1 = \(2, 3\): expected the shape \(3, 2\)"),
        ({"layer.2": torch.zeros(2, 3)}, r"adapter = 'layer\.1': expected the tensors of this stage"),
    ],
)
def test_a_snapshot_of_another_adapter_is_refused(folder, parameters, message):
    task = PLAN.tasks[0]
    tenant = Tenant(task, {key: nn.Parameter(value) for key, value in parameters.items()})
    with pytest.raises(SpecError, match=f"checkpoint of task {task.id}: {message}"):
        tenant.restore(load_rank_state(folder, 10, 1)["tenants"][task.id])


def test_files_that_new_ones_could_mix_with_go_and_complete_ones_are_set_aside(folder):
    _save(folder, 15)
    (folder / "step-000015" / "rank-0.sha256").unlink()
    _flip(_newest(folder), -5)
    clear_newer(folder, RANKS, 5)
    assert sorted(path.name for path in folder.iterdir()) == ["step-000005", "unused-step-000010"]
    assert complete_checkpoints(folder, RANKS) == [5]
