"""A run that is watched: a table and a bar for people, lines of JSON for programs."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from muxtune.support.files import OutputError
from muxtune.support.progress import RunProgress, TaskProgress, save_progress_file
from runtime.engine.job import RunJob
from runtime.launch.watching import MOST_ROWS, live_table, watched


def _task(name: str, state: str = "running", **changes: object) -> TaskProgress:
    fields = {
        "id": name,
        "method": "lora",
        "state": state,
        "steps_done": 3,
        "steps": 9,
        "loss": 0.25,
        "effective_tokens": 10,
        "effective_tokens_per_s": None,
        "share": None,
        "eta_s": None,
    }
    return TaskProgress.model_validate(fields | changes)


def _job(folder, **changes: object) -> RunJob:
    return RunJob(out_dir=folder, steps=9, first_step=0, **changes)


def _save(folder, written_s: float, *tasks: TaskProgress) -> None:
    save_progress_file(RunProgress(wall_s=1.0, written_s=written_s, tasks=tasks), folder)


def test_a_line_each_time_that_there_is_news(tmp_path):
    lines = tmp_path / "progress.jsonl"
    with watched(_job(tmp_path, json_lines=lines)) as on_progress:
        on_progress(0)  # nothing is there yet
        _save(tmp_path, 1.0, _task("a"))
        on_progress(1)
        on_progress(2)
        _save(tmp_path, 2.0, _task("a", "finished"))
    states = [task["state"] for line in lines.read_text().splitlines() for task in json.loads(line)["tasks"]]
    assert states == ["stopped", "finished"]  # nobody has the folder of this test locked


def test_people_see_a_row_per_task_and_how_far_the_run_is(tmp_path):
    _save(tmp_path, 1.0, _task("a[bold]", reason="\x1b[31mno"), _task("b", "failed"))
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=160, color_system=None)
    with watched(_job(tmp_path, progress=True), console) as on_progress:
        on_progress(4)
    shown = text.getvalue()
    assert "iterations" in shown
    assert "9/9" in shown
    assert "3 / 9" in shown
    assert "failed" in shown
    assert "[bold]" in shown, "an id is no markup"
    assert "\x1b[31m" not in shown


def test_of_many_tasks_those_that_train_are_shown(tmp_path):
    tasks = [*(_task(f"done{i}", "finished") for i in range(MOST_ROWS)), _task("last")]
    table = live_table(RunProgress(wall_s=1.0, written_s=0.0, tasks=tuple(tasks)))
    names = list(table.columns[0].cells)
    assert names[0] == "last"
    assert names[-1] == "and 1 more"
    assert len(names) == MOST_ROWS + 1


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    with (
        pytest.raises(OutputError, match=r"cannot write .*nowhere"),
        watched(_job(tmp_path, json_lines=tmp_path / "nowhere" / "lines")),
    ):
        pass


def test_a_run_that_nobody_watches_writes_nothing(tmp_path):
    with watched(_job(tmp_path)) as on_progress:
        on_progress(3)
    assert list(tmp_path.iterdir()) == []
