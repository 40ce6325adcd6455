"""A sweep from its file to its result."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import joblib
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from experiments.sweep.backends import Backend, check_backend, run_batches
from experiments.sweep.execution import Batch, CostsSource, failure_columns
from experiments.sweep.inputs import PointInputs
from experiments.sweep.journal import Finished, journal_path, open_journal
from experiments.sweep.points import Point, build_points
from experiments.sweep.rows import load_finished, save_rows
from experiments.sweep.specification import load_sweep
from experiments.sweep.summary import SweepSummary, summarize
from muxtune.support.errors import SpecError, UserError
from muxtune.support.processes import keeping

BATCH_POINTS = 8
"""Points that are handed to a process at once, at most; they share a planning problem."""

_BATCHES_PER_WORKER = 4
"""Batches per process, at least, so that all processes end at about the same time."""


def run_sweep(
    path: Path,
    out: Path,
    *,
    source: CostsSource,
    costs_digest: str = "",
    jobs: int | None = None,
    backend: Backend = "loky",
    resume: bool = False,
    force: bool = False,
    progress: bool = False,
) -> SweepSummary:
    """Plan all points of a sweep file, and write one row for each.

    What is finished is on disk at once (``OUT.journal``), so that a sweep that is killed goes on with
    ``resume``. Rows are the same for any number of jobs, except for the planning times.

    Args:
        path: Sweep file.
        out: Parquet file; written when everything is planned.
        source: Source of operator costs.
        costs_digest: Identity of what ``source`` reads; points that were finished with others do not count.
        jobs: Processes; by default one per core.
        backend: Backend that runs the batches.
        resume: Keep what ``out`` and its journal have. The file may have got more points since, nothing else.
        force: Replace what an earlier sweep has left in ``out``.
        progress: Show a bar on stderr.

    Raises:
        UserError: Something in the file is wrong, ``out`` has a sweep already, an interrupted one would be
            lost, or ``resume`` finds points that the file does not have.
        RunError: A worker died; what is finished is kept.
    """
    start_s = time.perf_counter()
    points = build_points(load_sweep(path), path, costs_digest)
    check_backend(backend)
    kept = journal_path(out)
    if resume and kept is None:
        raise SpecError("--resume", str(out), "a file that an earlier sweep can have left")
    with open_journal(kept) as journal:
        finished = _finished_before(path, out, points, journal.finished, resume=resume, force=force)
        reused = sum(point.digest in finished for point in points)
        for point in points:
            if point.refused is not None:
                finished[point.digest] = failure_columns("refused", point.refused) | {"planning_s": 0.0}
        todo = {p.digest: p.inputs for p in points if p.inputs is not None and p.digest not in finished}
        for inputs in {(inputs.model, inputs.cluster): inputs for inputs in todo.values()}.values():
            source.prepare(inputs.workload, inputs.model, inputs.cluster)
        batches = make_batches(todo, jobs or joblib.cpu_count())
        with (
            keeping(lambda: _kept(out, journal.finished, len(points))),
            _bar(len(points), len(points) - len(todo), shown=progress) as advance,
        ):
            warned: set[str] = set()
            for result in run_batches(batches, source, jobs=jobs, backend=backend):
                journal.append(result.outcomes)
                advance(len(result.outcomes))
                for text in result.warnings:
                    if text not in warned:
                        warned.add(text)
                        warnings.warn(text, stacklevel=2)
        finished |= journal.finished
        save_rows(out, points, finished)
        journal.remove()
    seconds = time.perf_counter() - start_s
    return summarize(points, finished, out=out, reused=reused, seconds=seconds)


def _kept(out: Path, finished: Finished, points: int) -> str:
    kept = journal_path(out)
    if kept is None or not finished:
        return "no point is kept"
    return f"{len(finished)} of {points} points are kept in {kept}; the same command with --resume goes on"


def make_batches(todo: Mapping[str, PointInputs], workers: int) -> list[Batch]:
    """Points with the same planning problem together, in batches that keep all workers busy to the end.

    Args:
        todo: Inputs by the digests of their points.
        workers: Number of processes.
    """
    size = min(BATCH_POINTS, max(1, len(todo) // (workers * _BATCHES_PER_WORKER)))
    groups: dict[Hashable, list[str]] = {}
    for digest, inputs in todo.items():
        groups.setdefault((inputs.workload, inputs.model, inputs.cluster), []).append(digest)
    return [
        Batch(digests=tuple(some), inputs=tuple(todo[digest] for digest in some))
        for digests in groups.values()
        for some in (digests[start : start + size] for start in range(0, len(digests), size))
    ]


def _finished_before(
    path: Path, out: Path, points: Sequence[Point], journalled: Finished, *, resume: bool, force: bool
) -> Finished:
    """What an earlier sweep into ``out`` has finished; our own failures are tried again."""
    if not resume:
        if journalled:
            raise UserError(
                f"{journal_path(out)} has {len(journalled)} finished points of an interrupted sweep: "
                "expected --resume to go on with them, or no such file to begin again"
            )
        if not force and out.is_file() and out.stat().st_size:
            raise SpecError(
                "--out", str(out), "--resume to add to the sweep in it, --force to replace it, or a new file"
            )
        return {}
    earlier = (load_finished(out) if out.exists() else {}) | journalled
    known = {point.digest for point in points}
    lost = len(earlier.keys() - known)
    if lost:
        raise UserError(
            f"--resume: {lost} of the {len(earlier)} finished points of {out} are not in {path} any more "
            "(it, a file it names or the profile has changed): expected the same points, or these and more"
        )
    return {digest: outcome for digest, outcome in earlier.items() if outcome.get("status") != "failed"}


@contextmanager
def _bar(total: int, done: int, *, shown: bool) -> Iterator[Callable[[int], object]]:
    """A progress bar; yields what moves it on by so many points."""
    columns = (TextColumn("points"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not shown) as bar:
        task = bar.add_task("points", total=total, completed=done)
        yield lambda points: bar.advance(task, points)
