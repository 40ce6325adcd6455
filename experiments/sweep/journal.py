"""Finished points, on disk as soon as they are finished, so that a killed sweep goes on where it was.

The journal lies beside the result, one line of JSON per batch of points. A line that is only half there, as a
kill can leave the last one, does not count. The file is locked while a sweep writes it, and removed when the
result is whole.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from experiments.sweep.execution import Outcome
from muxtune.errors import UserError

Finished = dict[str, Outcome]
"""Outcomes by the digest of their point."""


def journal_path(out: Path) -> Path:
    """Where the finished points of an unfinished sweep are."""
    return out.with_name(f"{out.name}.journal")


class Journal:
    """An open journal; made by :func:`open_journal`.

    Args:
        descriptor: Of the locked file.
        finished: What stands in it.
    """

    def __init__(self, descriptor: int, finished: Finished) -> None:
        self._descriptor = descriptor
        self.finished = finished

    def append(self, outcomes: Finished) -> None:
        """Add finished points; they are on disk when this returns."""
        os.write(self._descriptor, (json.dumps(outcomes) + "\n").encode())
        os.fsync(self._descriptor)
        self.finished |= outcomes


@contextmanager
def open_journal(path: Path) -> Iterator[Journal]:
    """Open or begin a journal, for this process alone.

    Raises:
        UserError: Another sweep writes it, or the file is no journal.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{path} is being written by another sweep") from error
        finished, whole_bytes = _read(path)
        os.ftruncate(descriptor, whole_bytes)
        yield Journal(descriptor, finished)
    finally:
        if os.fstat(descriptor).st_size == 0:  # nothing is lost
            path.unlink(missing_ok=True)
        os.close(descriptor)


def _read(path: Path) -> tuple[Finished, int]:
    """Finished points, and the bytes of the whole lines."""
    content = path.read_bytes()
    whole_bytes = content.rfind(b"\n") + 1
    finished: Finished = {}
    for number, line in enumerate(content[:whole_bytes].splitlines(), start=1):
        try:
            outcomes = json.loads(line)
            finished.update(outcomes)
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}:{number} is no line of a sweep's journal; remove the file") from error
    return finished, whole_bytes
