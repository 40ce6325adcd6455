"""A checkpoint's file that is not what was written, or of another task, is named; the one before is used."""

from __future__ import annotations

import shutil
from functools import partial

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from muxtune.support.errors import SpecError
from runtime.distributed.sharding import Entries, Portion
from runtime.tasks.checkpoint import RunCheckpoints
from runtime.tasks.checkpoint_files import (
    DamagedCheckpointError,
    complete_steps,
    identity,
    load_task,
    save_part,
)
from runtime.tasks.gradients import squared_gradient_norms
from runtime.tasks.losses import StepLoss
from runtime.tasks.tenant import Tenant
from tests.plans import make_plan

PLAN = make_plan(pp=2)
PLAN = PLAN.with_decisions(tasks=tuple(task.model_copy(update={"steps": 20}) for task in PLAN.tasks))
A, B = PLAN.tasks[:2]
PARTS = 2


def _tenant(task, part: int, value: float = 0.0) -> Tenant:
    tenant = Tenant(task, {f"layer.{part}": nn.Parameter(torch.full((2, 3), float(value)))})
    tenant.parameters[f"layer.{part}"].grad = torch.full((2, 3), 0.5)
    tenant.step(0, squared_gradient_norms([tenant])[0].sqrt())
    return tenant


def _folder(run_dir, task=A):
    return run_dir / "tasks" / task.id / "checkpoints"


def _save(run_dir, step: int, *, tasks=PLAN.tasks, plan=PLAN) -> None:
    for part in range(PARTS):
        for i, task in enumerate(tasks):
            tenant = _tenant(task, part, step + i)
            save_part(
                _folder(run_dir, task),
                tenant,
                tenant.snapshot(),
                identity=identity(plan, task),
                steps_done=step,
                part=part,
                parts=PARTS,
                losses=[StepLoss(0, 1 / 3, 5, 0.25)] if part else [],
            )


@pytest.fixture
def run_dir(tmp_path):
    """Two checkpoints of every task, in two parts."""
    for step in (5, 10):
        _save(tmp_path, step)
    return tmp_path


def _newest(run_dir, part: int = 1, task=A):
    return _folder(run_dir, task) / "step-000010" / f"part-{part}-of-2.safetensors"


def _flip(path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def _rewrite(run_dir, change) -> None:
    """Other tensors under the same metadata, as a tool would write them that knows nothing of digests."""
    path = _newest(run_dir)
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(change(tensors), path, metadata)


def _digit_of_the_metadata(run_dir) -> None:
    path = _newest(run_dir)
    content = path.read_bytes()
    old = b'\\"examples_taken\\":80'
    assert old in content
    path.write_bytes(content.replace(old, old[:-2] + b"81"))


DAMAGE = {
    "a bit of a tensor": lambda run_dir: _flip(_newest(run_dir), -5),
    "a bit of the header": lambda run_dir: _flip(_newest(run_dir), 20),
    "a digit of the metadata": _digit_of_the_metadata,
    "cut short": lambda run_dir: _newest(run_dir).write_bytes(_newest(run_dir).read_bytes()[:-8]),
    "empty": lambda run_dir: _newest(run_dir).write_bytes(b""),
    "a folder": lambda run_dir: (_newest(run_dir).unlink(), _newest(run_dir).mkdir()),
    "a moment missing": partial(
        _rewrite, change=lambda tensors: {n: t for n, t in tensors.items() if "exp_avg_sq" not in n}
    ),
    "foreign shapes": partial(
        _rewrite, change=lambda tensors: {n: torch.cat([t, t]) for n, t in tensors.items()}
    ),
    "other part": lambda run_dir: shutil.copy(_newest(run_dir, 0), _newest(run_dir, 1)),
    "other step": lambda run_dir: shutil.copy(
        _folder(run_dir) / "step-000005" / "part-1-of-2.safetensors", _newest(run_dir)
    ),
    "other task": lambda run_dir: shutil.copy(_newest(run_dir, task=B), _newest(run_dir)),
    "other backbone": lambda run_dir: _save(
        run_dir, 10, plan=PLAN.with_decisions(model=PLAN.model.model_copy(update={"vocab": 7}))
    ),
    "pickled": lambda run_dir: torch.save({"adapter": torch.zeros(3)}, _newest(run_dir)),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_the_checkpoint_before_a_damaged_one_is_used_and_the_damage_is_named(run_dir, damage):
    checkpoints = RunCheckpoints(run_dir, PLAN)
    assert checkpoints.whole().iteration == 10
    damage(run_dir)
    found = checkpoints.whole()
    assert found.iteration == 5
    assert "step-000010" in found.complaints[0]
    assert "\n" not in found.complaints[0]


def test_a_checkpoint_without_one_of_its_parts_is_none(run_dir):
    _newest(run_dir).unlink()
    checkpoints = RunCheckpoints(run_dir, PLAN)
    assert complete_steps(_folder(run_dir)) == [5]
    assert complete_steps(_folder(run_dir, B)) == [5, 10]
    assert checkpoints.whole().iteration == 5


def test_what_was_written_comes_back_bit_by_bit(run_dir):
    for i, task in enumerate(PLAN.tasks):
        state = load_task(_folder(run_dir, task), 10, identity(PLAN, task))
        expected, found = _tenant(task, 1, 10 + i), _tenant(task, 1)
        found.restore(state.part_of(found))
        for tenant in (expected, found):
            tenant.parameters["layer.1"].grad = torch.full((2, 3), 0.25)
            tenant.step(1, squared_gradient_norms([tenant])[0].sqrt())
        assert torch.equal(found.parameters["layer.1"], expected.parameters["layer.1"])
        assert state.losses == [StepLoss(0, 1 / 3, 5, 0.25)]


def _cut_tenant(columns: tuple[int, int], rows: tuple[int, int], places: list[int], dtype) -> Tenant:
    """A rank's part of three tensors: cut by columns, cut by rows, and a list of which it has some places."""
    portions = {
        "columns": Portion(1, 5, (columns,)),
        "rows": Portion(0, 6, (rows,)),
        "places": Entries(0, 4, ((0, 4),), picked=torch.tensor(places)),
    }
    shapes = {
        "columns": (2, columns[1] - columns[0]),
        "rows": (rows[1] - rows[0], 2),
        "places": (len(places),),
    }
    own = {name: nn.Parameter(torch.zeros(shape, dtype=dtype)) for name, shape in shapes.items()}
    return Tenant(A, own, portions)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_parts_of_one_mesh_are_taken_up_by_another(tmp_path, dtype):
    """Columns that two ranks had come to one; rows of one are cut for three; places in a list stay theirs."""
    first = _cut_tenant((0, 3), (0, 6), [0, 2], dtype)
    second = _cut_tenant((3, 5), (0, 6), [3, 1], dtype)
    for each in (first, second):
        torch.manual_seed(len(each.parameters["columns"]))
        for parameter in each.parameters.values():
            parameter.data.copy_(torch.randn_like(parameter))
            parameter.grad = torch.randn_like(parameter)
        each.step(0, 1.0)
    for name in ("adapter", *first.optimizer.state[first.parameters["rows"]]):  # held by both, so alike
        _of(second, name, "rows").copy_(_of(first, name, "rows"))
    for part, each in enumerate((first, second)):
        save_part(tmp_path, each, each.snapshot(), identity="it", steps_done=1, part=part, parts=2)
    state = load_task(tmp_path, 1, "it")
    for rows in ((0, 2), (2, 3), (3, 6)):
        after = _cut_tenant((0, 5), rows, [3, 0], dtype)
        after.restore(state.part_of(after))
        for kind in ("adapter", "exp_avg", "exp_avg_sq"):
            columns = [_of(each, kind, "columns") for each in (first, second)]
            assert torch.equal(_of(after, kind, "columns"), torch.cat(columns, 1))
            assert torch.equal(_of(after, kind, "rows"), _of(first, kind, "rows")[slice(*rows)])
            expected = torch.stack([_of(second, kind, "places")[0], _of(first, kind, "places")[0]])
            assert torch.equal(_of(after, kind, "places"), expected)
        assert {float(_of(after, "step", name)) for name in after.parameters} == {1.0}


def _of(tenant: Tenant, kind: str, name: str) -> torch.Tensor:
    parameter = tenant.parameters[name]
    return parameter.data if kind == "adapter" else tenant.optimizer.state[parameter][kind]


def test_a_rank_reads_no_damaged_file(run_dir):
    _flip(_newest(run_dir), -5)
    with pytest.raises(DamagedCheckpointError, match=r"part-1-of-2\.safetensors: damaged, its content does"):
        load_task(_folder(run_dir), 10, identity(PLAN, A))


def test_a_state_without_a_tensor_of_the_rank_is_refused(run_dir):
    state = load_task(_folder(run_dir), 10, identity(PLAN, A))
    other = _tenant(A, 2)
    with pytest.raises(DamagedCheckpointError, match=rf"task {A.id}, step 10: layer\.2 is missing"):
        state.part_of(other)


def test_a_state_of_other_shapes_is_refused(run_dir):
    state = load_task(_folder(run_dir), 10, identity(PLAN, A))
    tenant = Tenant(A, {"layer.1": nn.Parameter(torch.zeros(2, 4))}, {"layer.1": Portion(0, 2, ((0, 2),))})
    with pytest.raises(SpecError, match=r"adapter layer\.1 = \(2, 3\): expected the shape \(2, 4\)"):
        tenant.restore(state.part_of(tenant))


def test_newer_ones_make_room_and_damaged_ones_are_set_aside(run_dir):
    _save(run_dir, 15, tasks=[B])
    _flip(_newest(run_dir), -5)
    checkpoints = RunCheckpoints(run_dir, PLAN)
    found = checkpoints.whole()
    checkpoints.clear_newer(found.iteration, found.damaged)
    assert sorted(path.name for path in _folder(run_dir).iterdir()) == ["step-000005", "unused-step-000010"]
    assert sorted(path.name for path in _folder(run_dir, B).iterdir()) == ["step-000005"]
