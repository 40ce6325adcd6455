"""How far a run is, as it is left for others to read."""

from __future__ import annotations

import time

import pytest

from muxtune.support.errors import SpecError, UserError
from muxtune.support.progress import PROGRESS, RunProgress, TaskProgress, load_progress, save_progress_file
from muxtune.support.run_folder import locked

STATES = ("running", "finished", "failed")


def _progress() -> RunProgress:
    return RunProgress(
        wall_s=3.0,
        written_s=time.time(),
        tasks=tuple(
            TaskProgress(
                id=state,
                method="lora",
                state=state,
                steps_done=2,
                steps=4,
                loss=0.5,
                effective_tokens=100,
                effective_tokens_per_s=10.0 if state == "running" else None,
                share=1.0 if state == "running" else None,
                eta_s=2.0 if state == "running" else None,
            )
            for state in STATES
        ),
    )


def test_a_run_that_goes_on_is_read_as_it_was_written(tmp_path):
    save_progress_file(_progress(), tmp_path)
    with locked(tmp_path):
        assert [task.state for task in load_progress(tmp_path).tasks] == list(STATES)


def test_a_task_that_runs_where_nobody_does_was_stopped(tmp_path):
    save_progress_file(_progress(), tmp_path)
    with locked(tmp_path):
        pass
    tasks = load_progress(tmp_path).tasks
    assert [task.state for task in tasks] == ["stopped", "finished", "failed"]
    assert tasks[0].eta_s is None


def test_a_folder_without_a_run_and_a_file_of_others_are_named(tmp_path):
    with pytest.raises(UserError, match=r"progress\.json: No such file .*; expected the folder of a run"):
        load_progress(tmp_path)
    (tmp_path / PROGRESS).write_text('{"wall_s": "long"}')
    with pytest.raises(SpecError, match=r"progress\.json: wall_s = 'long': expected a valid number"):
        load_progress(tmp_path)
