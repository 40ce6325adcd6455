"""What people and programs see of a run while it goes on: a table with a bar on stderr, and lines of JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from muxtune.support.errors import UserError
from muxtune.support.files import OutputError
from muxtune.support.printable import printable
from muxtune.support.progress import COLUMNS, RunProgress, load_progress, progress_cells
from runtime.engine.job import RunJob

MOST_ROWS = 24
"""Tasks of the live table, at most; ``muxtune status`` shows all of many."""


@contextmanager
def watched(job: RunJob, console: Console | None = None) -> Iterator[Callable[[int], None]]:
    """Show a run, as far as its job asks for that.

    Args:
        job: Job of the run.
        console: Where; stderr by default.

    Yields:
        To be called with the number of finished iterations, whenever it has grown.

    Raises:
        OutputError: The file of JSON lines cannot be opened.
    """
    with ExitStack() as stack:
        shows: list[Callable[[int, RunProgress | None], None]] = []
        if job.progress:
            shows.append(stack.enter_context(_shown(job, console or Console(stderr=True))))
        if job.json_lines is not None:
            shows.append(_Lines(stack.enter_context(_opened(job.json_lines))).add)
        if not shows:
            yield lambda _: None
            return

        def show(done: int) -> None:
            progress = _read(job.out_dir)
            for each in shows:
                each(done, progress)

        yield show
        show(job.steps)


class _Lines:
    """One JSON object a line, each time that there is news."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._seen_s = 0.0

    def add(self, _: int, progress: RunProgress | None) -> None:
        if progress is None or progress.written_s == self._seen_s:
            return
        self._seen_s = progress.written_s
        try:
            self._file.write(progress.model_dump_json() + "\n")
            self._file.flush()
        except OSError as error:
            raise OutputError(f"cannot write {self._file.name}: {error.strerror}") from error


@contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    try:
        file = path.open("a", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from error
    with file:
        yield file


@contextmanager
def _shown(job: RunJob, console: Console) -> Iterator[Callable[[int, RunProgress | None], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console)
    entry = bar.add_task("iterations", total=job.steps, completed=job.first_step)
    try:
        with Live(bar, console=console, refresh_per_second=4) as live:

            def show(done: int, progress: RunProgress | None) -> None:
                bar.update(entry, completed=done)
                if progress is not None and console.is_terminal:
                    live.update(Group(live_table(progress), bar))

            yield show
    finally:
        if not console.is_interactive:
            console.print()  # what is said next has a line of its own


def live_table(progress: RunProgress) -> Table:
    """A row per task; those that train first, if there are too many."""
    table = Table(*COLUMNS, box=None, pad_edge=False)
    tasks = sorted(progress.tasks, key=lambda task: task.state != "running")
    for task in tasks[:MOST_ROWS]:
        table.add_row(*(printable(cell).replace("[", r"\[") for cell in progress_cells(task)))
    if len(tasks) > MOST_ROWS:
        table.add_row(f"and {len(tasks) - MOST_ROWS} more")
    return table


def _read(run_dir: Path) -> RunProgress | None:
    try:
        return load_progress(run_dir)
    except UserError:  # not there yet
        return None
