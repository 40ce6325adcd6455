"""Runs that break: one cause is reported, nothing keeps running, and a resumed run loses nothing."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from muxtune.model import load_model_spec
from muxtune.plan import Plan, save_plan
from muxtune.support.errors import RunError, SpecError, UserError
from muxtune.tasks import Workload
from runtime import RunOptions, run_plan
from runtime.tasks.checkpoint import RunCheckpoints
from tests.helpers import make_boundless_model, make_hf_model, make_plan, make_task, write_examples
from tests.integration.prepared import prepared_ranks
from tests.integration.processes import rank_pids, wait_until

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="finds the ranks in /proc"),
]

STEPS = 120
EVERY = 5


def _plan(folder: Path, hf_dirs: dict[str, Path], **changes: object) -> Plan:
    tasks = tuple(
        make_task(name, write_examples(folder / f"{name}.jsonl", seed=i), **({"steps": steps} | changes))
        for i, (name, steps) in enumerate([("a", STEPS), ("b", STEPS - 7), ("c", 9)])
    )
    # Masks of dropout have to be those of an undisturbed run, too.
    dropped = tasks[0].peft.model_copy(update={"dropout": 0.2})
    tasks = (tasks[0].model_copy(update={"peft": dropped}), *tasks[1:])
    model = load_model_spec(str(hf_dirs["llama"]))
    return make_plan(Workload(tasks=tasks), model, partition=[["a", "c"], ["b"]], template="continuous")


def _adapter(run_dir: Path, task_id: str) -> dict:
    return load_file(run_dir / "tasks" / task_id / "adapter" / "adapter_model.safetensors")


def test_after_kill_9_of_a_rank_a_resumed_run_ends_with_the_same_adapters(tmp_path, hf_dirs):
    plan = _plan(tmp_path, hf_dirs)
    with prepared_ranks():
        run_plan(plan, tmp_path / "whole", RunOptions(checkpoint_every=EVERY))

    run_dir = tmp_path / "killed"
    checkpoints = RunCheckpoints(run_dir, plan)

    def kill_rank_1() -> None:
        wait_until(lambda: (checkpoints.newest or 0) >= 2 * EVERY, timeout_s=120)
        os.kill(rank_pids(run_dir)[1], signal.SIGKILL)

    killer = threading.Thread(target=kill_rank_1)
    killer.start()
    with pytest.raises(RunError, match="rank 1: killed by SIGKILL"):
        run_plan(plan, run_dir, RunOptions(checkpoint_every=EVERY))
    killer.join()
    assert rank_pids(run_dir) == {}
    kept = checkpoints.newest
    assert kept is not None
    with pytest.raises(SpecError, match=f"expected more than {kept}"):
        run_plan(plan, run_dir, RunOptions(steps=kept, resume=True))

    with prepared_ranks():
        report = run_plan(plan, run_dir, RunOptions(checkpoint_every=EVERY, resume=True))
    assert report.first_step == kept
    for task in plan.tasks:
        resumed, whole = _adapter(run_dir, task.id), _adapter(tmp_path / "whole", task.id)
        assert all((resumed[key] == tensor).all() for key, tensor in whole.items())
        losses = [
            [line.split(",")[:3] for line in (folder / "tasks" / task.id / "losses.csv").read_text().split()]
            for folder in (run_dir, tmp_path / "whole")
        ]
        assert losses[0] == losses[1]
    assert run_plan(plan, run_dir, RunOptions(resume=True)) == report  # nothing left to do


def test_a_loss_that_is_not_finite_ends_the_run_and_names_task_and_step(tmp_path, hf_dirs):
    plan = _plan(tmp_path, {"llama": make_boundless_model(tmp_path / "model", hf_dirs["llama"])})
    with (
        prepared_ranks(),
        pytest.raises(RunError, match=r"rank 1: task [abc], step \d+: the loss is (nan|inf)") as caught,
    ):
        run_plan(plan, tmp_path / "run", RunOptions(strict=True))
    assert "\n" not in str(caught.value)
    assert '"state": "failed"' in "".join(
        path.read_text() for path in (tmp_path / "run" / "tasks").glob("*/status.json")
    )
    assert "NonFiniteError" in (tmp_path / "run" / "logs" / "rank-1.log").read_text()
    assert not (tmp_path / "run" / "run.json").exists()
    assert multiprocessing.active_children() == []


def test_unreadable_weights_are_the_users_mistake(tmp_path):
    folder = make_hf_model(tmp_path / "model", "llama")
    plan = _plan(tmp_path, {"llama": folder})
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with (
        prepared_ranks(),
        pytest.raises(
            UserError, match=r"model\.source = .*: expected a directory with readable weights"
        ) as caught,
    ):
        run_plan(plan, tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert multiprocessing.active_children() == []


def test_no_rank_outlives_a_killed_parent(tmp_path, hf_dirs):
    plan = _plan(tmp_path, hf_dirs)
    save_plan(plan, tmp_path / "plan.json")
    run_dir = tmp_path / "run"
    code = "import sys, pathlib, runtime; runtime.run_plan(*map(pathlib.Path, sys.argv[1:]))"
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "plan.json"), str(run_dir)])
    try:
        wait_until(lambda: len(rank_pids(run_dir)) == 2, timeout_s=120)
        time.sleep(1.0)  # wherever they are by then
    finally:
        parent.kill()
        parent.wait()
    wait_until(lambda: rank_pids(run_dir) == {}, timeout_s=60)  # it may still be importing torch
