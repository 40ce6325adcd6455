"""Going on with a run, or trying to: nothing that is finished or kept is lost."""

from __future__ import annotations

import hashlib
import shutil
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from muxtune.model import load_model_spec
from muxtune.plan import Plan, load_plan
from muxtune.support.errors import RunError, SpecError, UserError
from muxtune.support.run_folder import LOCK, locked
from muxtune.tasks import Workload
from runtime import RunOptions, load_report, run_plan
from runtime.tasks.checkpoint import RunCheckpoints
from tests.helpers import make_plan, make_task, write_examples
from tests.integration.parity import read_losses
from tests.integration.prepared import prepared_ranks
from tests.integration.processes import rank_pids, wait_until

pytestmark = [pytest.mark.integration, pytest.mark.slow]

EVERY = 2


def _plan(folder: Path, hf_dirs: dict[str, Path], steps: int) -> Plan:
    tasks = tuple(
        make_task(name, write_examples(folder / f"{name}.jsonl", seed=i), steps=steps)
        for i, name in enumerate("ab")
    )
    return make_plan(Workload(tasks=tasks), load_model_spec(str(hf_dirs["llama"])), partition=[["a"], ["b"]])


def _content(run_dir: Path) -> dict[str, str]:
    return {
        str(path.relative_to(run_dir)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(run_dir.rglob("*"))
        if path.is_file() and path.name != LOCK
    }


def _adapter(run_dir: Path, task_id: str) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "tasks" / task_id / "adapter" / "adapter_model.safetensors")


def _flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)


def fail_at(rank: int, *, step: int) -> None:
    """Rank 0 raises before a step."""
    from runtime.engine.stepper import Stepper

    sums = Stepper._sum_gradients

    def fail(self, action, active):
        if action.number == step and rank == 0:
            raise RuntimeError("on demand")
        return sums(self, action, active)

    Stepper._sum_gradients = fail


def test_a_finished_run_is_not_made_shorter_and_stays_finished_while_it_is_made_longer(tmp_path, hf_dirs):
    plan, run_dir = _plan(tmp_path, hf_dirs, 9), tmp_path / "run"
    with prepared_ranks():
        report = run_plan(plan, run_dir, RunOptions(steps=6, checkpoint_every=EVERY))
    finished = _content(run_dir)

    def assert_refused(steps: int) -> None:
        before = _content(run_dir)
        message = rf"^steps = {steps}: expected at least 6, the steps of the finished run in "
        with pytest.raises(SpecError, match=message):
            run_plan(plan, run_dir, RunOptions(steps=steps, resume=True))
        assert _content(run_dir) == before

    for steps in (1, 4, 5):
        assert_refused(steps)
    assert run_plan(plan, run_dir, RunOptions(steps=6, resume=True)) == report
    assert _content(run_dir) == finished

    with prepared_ranks(partial(fail_at, step=7)), pytest.raises(RunError, match="on demand"):
        run_plan(plan, run_dir, RunOptions(steps=9, resume=True, checkpoint_every=50))
    assert load_report(run_dir / "run-before.json") == report
    assert not (run_dir / "run.json").exists()
    assert_refused(5)  # the adapters of six steps are still there
    with prepared_ranks():
        assert run_plan(plan, run_dir, RunOptions(resume=True)).steps == 9
        run_plan(plan, tmp_path / "undisturbed")
    assert not (run_dir / "run-before.json").exists()
    for task in plan.tasks:
        expected = _adapter(tmp_path / "undisturbed", task.id)
        assert all(torch.equal(_adapter(run_dir, task.id)[key], tensor) for key, tensor in expected.items())


@pytest.mark.parametrize("rank", [0, 1])
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(tmp_path, hf_dirs, rank):
    plan, run_dir = _plan(tmp_path, hf_dirs, 7), tmp_path / "run"
    with prepared_ranks(partial(fail_at, step=6)), pytest.raises(RunError, match="on demand"):
        run_plan(plan, run_dir, RunOptions(checkpoint_every=EVERY))
    newest = RunCheckpoints(run_dir, plan).newest
    assert newest >= 4
    damaged = run_dir / "tasks" / "b" / "checkpoints" / f"step-{newest:06d}"
    _flip_a_bit(damaged / f"part-{rank}-of-2.safetensors")
    with (
        prepared_ranks(),
        pytest.warns(UserWarning, match=rf"b/.*/part-{rank}-of-2\.safetensors: damaged.*; going on from"),
    ):
        assert (
            run_plan(plan, run_dir, RunOptions(resume=True, checkpoint_every=EVERY)).first_step
            == newest - EVERY
        )
    assert damaged.with_name(f"unused-{damaged.name}").is_dir()
    with prepared_ranks():
        run_plan(plan, tmp_path / "undisturbed")
    for task in plan.tasks:
        expected = _adapter(tmp_path / "undisturbed", task.id)
        assert all(torch.equal(_adapter(run_dir, task.id)[key], tensor) for key, tensor in expected.items())


def test_a_run_whose_checkpoints_are_all_damaged_does_not_silently_start_again(tmp_path, hf_dirs):
    plan, run_dir = _plan(tmp_path, hf_dirs, 7), tmp_path / "run"
    with prepared_ranks(partial(fail_at, step=6)), pytest.raises(RunError, match="on demand"):
        run_plan(plan, run_dir, RunOptions(checkpoint_every=EVERY))
    for path in run_dir.glob("tasks/a/checkpoints/*/part-1-of-2.safetensors"):
        _flip_a_bit(path)
    before = _content(run_dir)
    with pytest.raises(UserError, match=r"^no checkpoint to resume from: .*part-1-of-2.*damaged") as caught:
        run_plan(plan, run_dir, RunOptions(resume=True))
    assert "\n" not in str(caught.value)
    assert _content(run_dir) == before


def test_a_run_is_taken_up_on_another_mesh(tmp_path, hf_dirs):
    """Two stages, then two shards, then one rank: as if it had always been one rank, but for rounding."""
    model = load_model_spec(str(hf_dirs["llama"]), "float64")
    pefts = {
        "a": {"method": "lora", "r": 4, "alpha": 8, "targets": "all-linear", "use_dora": True},
        "b": {"method": "shira", "r": 2, "targets": ["q_proj", "down_proj"]},
        "c": {"method": "prefix_tuning", "num_virtual_tokens": 3},
    }
    tasks = tuple(
        make_task(name, write_examples(tmp_path / f"{name}.jsonl", seed=i), steps=9, peft=peft, shuffle=True)
        for i, (name, peft) in enumerate(pefts.items())
    )

    def on_mesh(**mesh: int) -> Plan:
        partition = [["a", "b"], ["c"]] if mesh["pp"] == 2 else [["a"], ["b", "c"]]
        return make_plan(Workload(tasks=tasks), model, partition=partition, **mesh)

    run_dir, alone = tmp_path / "run", on_mesh(pp=1)
    with prepared_ranks():
        run_plan(on_mesh(pp=2), run_dir, RunOptions(steps=3, checkpoint_every=EVERY))
        for plan, first, steps in ((on_mesh(pp=2), 2, 5), (on_mesh(pp=1, tp=2), 4, 7), (alone, 6, 9)):
            options = RunOptions(resume=True, steps=steps, checkpoint_every=EVERY)
            assert run_plan(plan, run_dir, options).first_step == first
        run_plan(alone, tmp_path / "undisturbed")
    for task in tasks:
        expected, found = _adapter(tmp_path / "undisturbed", task.id), _adapter(run_dir, task.id)
        for key, tensor in expected.items():
            torch.testing.assert_close(found[key], tensor, rtol=1e-9, atol=1e-12)
        losses, _ = read_losses(run_dir, task.id)
        assert losses == pytest.approx(read_losses(tmp_path / "undisturbed", task.id)[0], rel=1e-9)
    assert [path.name for path in sorted((run_dir / "plans").iterdir())] == [
        f"from-{first:06d}.json" for first in (0, 4, 6)
    ]
    assert load_plan(run_dir / "plan.json") == alone


@pytest.mark.parametrize("resume", [False, True])
def test_a_second_run_in_the_same_folder_is_refused_and_disturbs_nothing(tmp_path, hf_dirs, resume):
    plan, run_dir = _plan(tmp_path, hf_dirs, 5), tmp_path / "run"
    run_dir.mkdir()
    with locked(run_dir), pytest.raises(UserError, match=r"run is in use by another run \(process \d+ on "):
        run_plan(plan, run_dir, RunOptions(resume=resume))
    assert [path.name for path in run_dir.iterdir()] == [LOCK]
    with prepared_ranks():
        assert run_plan(plan, run_dir, RunOptions(resume=resume)).steps == 5


def test_a_run_ends_with_one_line_when_its_folder_vanishes(tmp_path, hf_dirs):
    plan, run_dir = _plan(tmp_path, hf_dirs, 2000), tmp_path / "run"

    def take_away() -> None:
        wait_until(lambda: RunCheckpoints(run_dir, plan).newest is not None, timeout_s=120)
        run_dir.rename(tmp_path / "elsewhere")
        shutil.rmtree(tmp_path / "elsewhere", ignore_errors=True)

    thief = threading.Thread(target=take_away)
    with prepared_ranks():
        thief.start()
        with pytest.raises(RunError, match=r"the run's folder .*run is gone") as caught:
            run_plan(plan, run_dir, RunOptions(checkpoint_every=EVERY))
        thief.join()
    assert "\n" not in str(caught.value)
    assert rank_pids(run_dir) == {}
    assert not (run_dir / "plan.json").exists()


def test_half_written_files_of_a_killed_run_go_at_the_next_start(tmp_path, hf_dirs):
    plan, run_dir = _plan(tmp_path, hf_dirs, 5), tmp_path / "run"
    with prepared_ranks(partial(fail_at, step=3)), pytest.raises(RunError, match="on demand"):
        run_plan(plan, run_dir, RunOptions(checkpoint_every=EVERY))
    left = run_dir / "tasks" / "a" / ".losses.csv.abcd1234"
    left.write_text("half")
    with prepared_ranks():
        run_plan(plan, run_dir, RunOptions(resume=True))
    assert not left.exists()
