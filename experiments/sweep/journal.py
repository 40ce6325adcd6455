"""Finished points, on disk as soon as they are finished, so that a killed sweep goes on where it was.

The journal lies beside the result, one line of JSON per batch of points. A line that is only half there, as a
kill can leave the last one, does not count. The file is locked while a sweep writes it, and removed when the
result is whole. Only who holds the lock of the file that has the name at that moment may use or remove it: a
file that was opened may have lost its name before it was locked.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from experiments.sweep.execution import Outcome
from muxtune.support.errors import UserError
from muxtune.support.files import OutputError, written_file

Finished = dict[str, Outcome]
"""Outcomes by the digest of their point."""

_LINE_START = b'{"'


def journal_path(out: Path) -> Path | None:
    """Where the finished points of an unfinished sweep are: beside the file that ``out`` leads to.

    None if that is no file (``/dev/null``, a FIFO): nothing of it can be kept, and nobody can go on with it.
    """
    target = written_file(out)
    return None if target is None else target.with_name(f"{target.name}.journal")


class Journal:
    """An open journal; made by :func:`open_journal`.

    Args:
        path: Path of the journal, if it has one.
        descriptor: Descriptor of the locked file.
        finished: Outcomes that stand in it.
    """

    def __init__(self, path: Path | None, descriptor: int, finished: Finished) -> None:
        self._path = path
        self._descriptor = descriptor
        self.finished = finished

    def append(self, outcomes: Finished) -> None:
        """Add finished points; they are on disk when this returns.

        Raises:
            OutputError: They cannot be written; what was there before is whole.
        """
        line = memoryview((json.dumps(outcomes) + "\n").encode())
        whole_bytes = os.fstat(self._descriptor).st_size
        try:
            while line:
                line = line[os.write(self._descriptor, line) :]
            os.fsync(self._descriptor)
        except OSError as error:
            os.ftruncate(self._descriptor, whole_bytes)  # no half line for the next one to stand behind
            name = self._path or "the finished points"
            raise OutputError(f"cannot write {name}: {error.strerror}") from error
        self.finished |= outcomes

    def remove(self) -> None:
        """Remove the file, whose points are elsewhere now; its lock is held until it is closed."""
        if self._path is not None and _has_name(self._descriptor, self._path):
            self._path.unlink()


@contextmanager
def open_journal(path: Path | None) -> Iterator[Journal]:
    """Open or begin a journal, for this process alone. One without points is removed in the end.

    Args:
        path: Path of the journal; None for one that nobody can find again.

    Raises:
        UserError: Another sweep writes it, or the file is no journal.
    """
    if path is None:
        with tempfile.TemporaryFile() as file:
            yield Journal(None, file.fileno(), {})
        return
    descriptor = _lock(path)
    try:
        finished, whole_bytes = _read(path, descriptor)
        os.ftruncate(descriptor, whole_bytes)
        journal = Journal(path, descriptor, finished)
        try:
            yield journal
        finally:
            if os.fstat(descriptor).st_size == 0:  # nothing is lost
                journal.remove()
    finally:
        os.close(descriptor)


def _lock(path: Path) -> int:
    """Descriptor of the file that has this name, locked."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                os.close(descriptor)
                raise UserError(f"{path} is being written by another sweep") from error
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                os.close(descriptor)
                raise UserError(f"{path} is no file: a sweep keeps its finished points there")
            if _has_name(descriptor, path):
                return descriptor
            os.close(descriptor)  # its sweep ended and removed it while we waited for the lock
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from error


def _has_name(descriptor: int, path: Path) -> bool:
    """Whether the name still is that of the open file."""
    try:
        named = path.stat()
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(descriptor), named)


def _read(path: Path, descriptor: int) -> tuple[Finished, int]:
    """Finished points, and the bytes of the whole lines."""
    with os.fdopen(os.dup(descriptor), "rb") as file:
        file.seek(0)
        content = file.read()
    whole_bytes = content.rfind(b"\n") + 1
    finished: Finished = {}
    for number, line in enumerate(content[:whole_bytes].splitlines(), start=1):
        try:
            outcomes = json.loads(line)
            if not all(isinstance(outcome, dict) for outcome in outcomes.values()):
                raise ValueError("an outcome without columns")
            finished.update(outcomes)
        except (ValueError, AttributeError, RecursionError) as error:
            raise UserError(f"{path}:{number} is no line of a sweep's journal; remove the file") from error
    if not content[whole_bytes:].startswith(_LINE_START[: len(content) - whole_bytes]):
        raise UserError(f"{path} does not end as a sweep's journal does; remove the file")
    return finished, whole_bytes
