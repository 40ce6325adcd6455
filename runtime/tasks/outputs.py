"""The files of one task in a run's folder."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from muxtune.support.errors import UserError, spec_error_from
from muxtune.support.files import write_text_atomically
from muxtune.tasks import PeftTask
from runtime.tasks.losses import StepLoss

ADAPTER = "adapter"
ADAPTER_INIT = "adapter-init"
CHECKPOINTS = "checkpoints"
LOSSES = "losses.csv"
STATUS = "status.json"
RUN_BEFORE = "run-before.json"
"""Report of a finished run while more steps are added to it; the adapters are still those of that report."""


class TaskStatus(BaseModel):
    """``tasks/<id>/status.json``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    state: Literal["running", "finished", "failed"]
    """``finished`` when the run that was asked for is done, even if it was limited to fewer steps."""
    steps_done: int
    steps: int
    """Steps of the task itself."""
    loss: float | None
    """Loss of the last finished step."""
    reason: str | None = None
    """Why it failed."""


def task_folder(run_dir: Path, task_id: str) -> Path:
    """Where everything of one task lies."""
    return run_dir / "tasks" / task_id


def save_progress(
    run_dir: Path,
    task: PeftTask,
    losses: Sequence[StepLoss],
    state: Literal["running", "finished"],
    failure: str | None = None,
) -> None:
    """Write ``losses.csv`` and ``status.json`` of a task; each is whole at any moment.

    Args:
        run_dir: The run's folder.
        task: Task whose files they are.
        losses: Losses of its steps that count.
        state: What it is, if it has not failed.
        failure: Why it has failed.
    """
    folder = task_folder(run_dir, task.id)
    lines = ["step,loss,target_tokens,wall_s"]
    # repr keeps all digits, so that a loss can be compared to 1e-9 and better
    lines += [f"{x.step},{x.loss!r},{x.target_tokens},{x.wall_s:.6f}" for x in losses]
    write_text_atomically(folder / LOSSES, "\n".join(lines) + "\n")
    status = TaskStatus(
        id=task.id,
        state=state if failure is None else "failed",
        steps_done=len(losses),
        steps=task.steps,
        loss=losses[-1].loss if losses else None,
        reason=failure,
    )
    write_text_atomically(folder / STATUS, status.model_dump_json(indent=1) + "\n")


def load_status(run_dir: Path, task_id: str) -> TaskStatus | None:
    """State of a task; None if nothing was written of it yet.

    Raises:
        UserError: The file is not one of ours.
    """
    path = task_folder(run_dir, task_id) / STATUS
    try:
        return TaskStatus.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"cannot read the state {path}: {error.strerror}") from error
    except ValidationError as error:
        raise spec_error_from(error, str(path)) from error


def load_losses(run_dir: Path, task_id: str) -> list[float]:
    """Losses of a task's steps.

    Raises:
        UserError: The file is missing or not one of ours.
    """
    path = task_folder(run_dir, task_id) / LOSSES
    try:
        with path.open(newline="") as file:
            return [float(row["loss"]) for row in csv.DictReader(file)]
    except OSError as error:
        raise UserError(f"cannot read the losses {path}: {error.strerror}") from error
    except (KeyError, ValueError) as error:
        raise UserError(f"{path} is not a file of losses of ours: {error}") from error
