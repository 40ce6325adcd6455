"""``muxtune status``."""

from __future__ import annotations

from muxtune.support.progress import RunProgress, TaskProgress, save_progress_file

TASK = TaskProgress(
    id="sst2",
    method="lora",
    state="failed",
    steps_done=6,
    steps=20,
    loss=0.51234,
    effective_tokens=100,
    effective_tokens_per_s=None,
    share=None,
    eta_s=None,
    reason="task sst2, step 6: \x1b[31mthe loss is nan",
)


def test_a_row_per_task_and_nothing_that_a_terminal_would_obey(cli, tmp_path):
    going = {
        "id": "rte",
        "state": "finished",
        "effective_tokens_per_s": 1234.5,
        "share": 0.25,
        "reason": None,
    }
    tasks = (TASK, TASK.model_copy(update=going))
    save_progress_file(RunProgress(wall_s=2.5, written_s=0.0, tasks=tasks), tmp_path)
    result = cli("status", tmp_path)
    assert result.code == 0
    first, second = (line for line in result.out.splitlines() if "lora" in line)
    assert "6 / 20" in first
    assert "0.5123" in first
    assert "failed" in first
    assert "25" in second
    assert "\x1b" not in result.out
    assert "after 2.50 s" in result.out
    assert cli("status", tmp_path, "--json").json["tasks"][0]["reason"] == TASK.reason


def test_no_folder_of_a_run(cli, tmp_path):
    result = cli("status", tmp_path / "nothing")
    assert result.code == 2
    assert "cannot read the progress" in result.err
    assert result.err.count("\n") == 1
