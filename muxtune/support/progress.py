"""``progress.json``: how far the tasks of a run have come, for whoever watches it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ValidationError

from muxtune.support.errors import UserError, spec_error_from
from muxtune.support.files import write_text_atomically
from muxtune.support.run_folder import refuse_if_locked
from muxtune.support.strict_models import STRICT
from muxtune.support.tables import show_percent, show_rate, show_seconds

PROGRESS = "progress.json"

State = Literal["running", "finished", "failed", "stopped"]


class TaskProgress(BaseModel):
    """One task of a run."""

    model_config = STRICT

    id: str
    method: str
    """PEFT method."""
    state: State
    """``stopped`` is said by who reads it, of a task that runs in a folder in which nobody does."""
    steps_done: int
    steps: int
    """Steps of the task itself, or those that the run is limited to."""
    loss: float | None
    """Loss of the last step."""
    effective_tokens: int
    """Tokens of the examples of all steps of this start."""
    effective_tokens_per_s: float | None
    """Rate of the last steps; null before there are two, and for a task that does not train."""
    share: float | None
    """Share of the effective tokens per second of all tasks."""
    eta_s: float | None
    """Seconds to its last step at the pace of the last ones."""
    reason: str | None = None
    """Why it has failed."""


class RunProgress(BaseModel):
    """All tasks of a run."""

    model_config = STRICT

    wall_s: float
    """Seconds that the run has taken, with those before it was resumed."""
    written_s: float
    """When this was written, in seconds since 1970."""
    tasks: tuple[TaskProgress, ...]


COLUMNS = ("task", "method", "state", "steps", "loss", "effective tokens/s", "share", "ETA", "why")
"""Titles of :func:`progress_cells`."""


def progress_cells(task: TaskProgress) -> list[str]:
    """A row of a table for people; control characters are not escaped."""
    return [
        task.id,
        task.method,
        task.state,
        f"{task.steps_done} / {task.steps}",
        "" if task.loss is None else f"{task.loss:.4f}",
        "" if task.effective_tokens_per_s is None else show_rate(task.effective_tokens_per_s),
        "" if task.share is None else show_percent(task.share),
        "" if task.eta_s is None else show_seconds(task.eta_s),
        task.reason or "",
    ]


def save_progress_file(progress: RunProgress, run_dir: Path) -> None:
    """Write the file; it is whole at any moment."""
    write_text_atomically(run_dir / PROGRESS, progress.model_dump_json(indent=1) + "\n")


def load_progress(run_dir: Path) -> RunProgress:
    """Read how far a run is, or was when it ended.

    Raises:
        UserError: There is no such file, or it is none of ours.
    """
    path = run_dir / PROGRESS
    try:
        progress = RunProgress.model_validate_json(path.read_bytes())
    except OSError as error:
        what = "expected the folder of a run that trains"
        raise UserError(f"cannot read the progress {path}: {error.strerror}; {what}") from error
    except ValidationError as error:
        raise spec_error_from(error, str(path)) from error
    if _is_in_use(run_dir):
        return progress
    tasks = tuple(
        task.model_copy(update={"state": "stopped", "eta_s": None}) if task.state == "running" else task
        for task in progress.tasks
    )
    return progress.model_copy(update={"tasks": tasks})


def age_s(progress: RunProgress) -> float:
    """Seconds since it was written."""
    return max(0.0, time.time() - progress.written_s)


def _is_in_use(run_dir: Path) -> bool:
    try:
        refuse_if_locked(run_dir)
    except UserError:
        return True
    return False
