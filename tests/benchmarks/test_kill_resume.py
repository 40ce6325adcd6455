"""Runs that are killed at random moments, and resumed, end as one that was left alone."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from benchmarks import kill_resume

TASKS = SimpleNamespace(tasks=[SimpleNamespace(id="a"), SimpleNamespace(id="b")])


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.skipif(sys.platform != "linux", reason="finds the ranks in /proc")
def test_after_five_kills_nothing_is_lost(tmp_path):
    outcome = kill_resume.kill_and_resume(tmp_path, kills=5, seed=1)
    assert outcome.kills.total() == len(outcome.resumed_at) == 5
    assert max(outcome.resumed_at) > 0, "some kills came while it trained"
    assert outcome.differences == []
    assert outcome.slowest_end_s < kill_resume.END_LIMIT_S


def _results(run_dir, *, value: float = 1.0, loss: str = "0.5") -> None:
    for task_id in "ab":
        folder = run_dir / "tasks" / task_id
        (folder / "adapter").mkdir(parents=True)
        tensor = torch.full((2,), value if task_id == "b" else 1.0, dtype=torch.float64)
        save_file({"w": tensor}, folder / "adapter" / "adapter_model.safetensors")
        (folder / "losses.csv").write_text(f"step,loss,target_tokens,wall_s\n0,{loss},7,{value}\n")


def test_the_last_bit_of_an_adapter_and_the_last_digit_of_a_loss_count(tmp_path):
    _results(tmp_path / "whole")
    _results(tmp_path / "same")
    _results(tmp_path / "other", value=1.0 + 2**-52, loss="0.5000000000000001")
    assert kill_resume._differences(TASKS, tmp_path / "whole", tmp_path / "same") == []
    assert kill_resume._differences(TASKS, tmp_path / "whole", tmp_path / "other") == [
        "tasks/a/losses.csv",
        "tasks/b/adapter/adapter_model.safetensors",
        "tasks/b/losses.csv",
    ]
