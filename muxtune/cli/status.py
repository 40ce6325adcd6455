"""``status``: how far a run is, from another terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from muxtune.cli.options import JsonFlag, WideFlag
from muxtune.cli.output import emit
from muxtune.support.progress import COLUMNS, RunProgress, age_s, load_progress, progress_cells
from muxtune.support.tables import format_table, show_seconds


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
    table = format_table(COLUMNS, [progress_cells(task) for task in progress.tasks])
    return f"{table}\n\nafter {show_seconds(progress.wall_s)}, {show_seconds(age_s(progress))} ago"
