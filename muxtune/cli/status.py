"""``status``: how far a run is, from another terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from muxtune.cli.options import JsonFlag, WideFlag
from muxtune.cli.output import emit
from muxtune.support.progress import RunProgress, TaskProgress, age_s, load_progress
from muxtune.support.tables import format_table, show_percent, show_rate, show_seconds


def status(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Folder of a run.", show_default=False)],
    wide: WideFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Show how far the tasks of a run are, while it goes on or after its end."""
    progress = load_progress(run_dir)
    emit(progress, progress_table(progress), wide=wide, as_json=as_json)


def progress_table(progress: RunProgress) -> str:
    """A row per task, and when they were so far."""
    header = ["task", "method", "state", "steps", "loss", "effective tokens/s", "share", "ETA", "why"]
    table = format_table(header, [_row(task) for task in progress.tasks])
    return f"{table}\n\nafter {show_seconds(progress.wall_s)}, {show_seconds(age_s(progress))} ago"


def _row(task: TaskProgress) -> list[str]:
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
