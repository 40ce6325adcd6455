"""Readings of a session as they come: whoever stops or kills a measurement loses what is under way only."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from muxtune.costs.profile import Overlap
from muxtune.support.errors import UserError
from muxtune.support.files import OutputError
from profiler.worker_protocol import Line, Reading, read_line

_MEASURED = tuple(json.dumps({name: 0})[:-3] for name in ("reading", "overlap"))
"""Beginnings of the lines with something measured."""


class Journal:
    """Lines of the measuring processes in a file beside the profile, until that is written.

    Args:
        path: File of the journal; None keeps nothing.
        descriptor: Open for reading and writing, and locked.
        conditions: Text of what readings depend on; those under other conditions are dropped.
    """

    def __init__(self, path: Path | None, descriptor: int | None, conditions: str) -> None:
        self.path = path
        self._descriptor = descriptor
        self.lines: tuple[Line, ...] = ()
        """What earlier sessions have measured."""
        self.is_empty = True
        """Whether it has nothing that was measured."""
        if descriptor is None:
            return
        head = json.dumps({"conditions": conditions})
        first, *texts = _whole_lines(descriptor)
        if first == head:
            self.lines = tuple(map(read_line, texts))
        else:
            texts = []
        kept = "".join(f"{text}\n" for text in (head, *texts)).encode()
        os.ftruncate(descriptor, 0)  # with it what a killed session has half written
        os.pwrite(descriptor, kept, 0)
        os.lseek(descriptor, 0, os.SEEK_END)
        self.is_empty = not any(isinstance(line, Reading | Overlap) for line in self.lines)

    def keep(self, text: str) -> None:
        """Add a line; it is with the system when this returns, so ``kill -9`` does not take it."""
        if self._descriptor is not None:
            os.write(self._descriptor, f"{text}\n".encode())
            self.is_empty = self.is_empty and not text.startswith(_MEASURED)

    def remove(self) -> None:
        """End it: the profile has everything."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


@contextmanager
def open_journal(out: Path | None, conditions: str) -> Iterator[Journal]:
    """The journal beside a profile that is to be written.

    Args:
        out: File of the profile; None, or what is no regular file, has no journal.
        conditions: Text of what readings depend on.

    Raises:
        UserError: Another process measures into the same profile.
    """
    if out is None:
        yield Journal(None, None, conditions)
        return
    path = journal_path(out)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from error
    journal = None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"another process is measuring into {out}: wait for it, or stop it") from error
        journal = Journal(path, descriptor, conditions)
        yield journal
    finally:
        if journal is not None and journal.is_empty:
            path.unlink(missing_ok=True)
        os.close(descriptor)


def journal_path(out: Path) -> Path:
    """File of the journal of a profile."""
    return out.with_name(f"{out.name}.partial")


def _whole_lines(descriptor: int) -> list[str]:
    """Lines that were written to their ends; one that is empty if there is none."""
    with os.fdopen(os.dup(descriptor), "rb") as file:
        file.seek(0)
        content = file.read()
    return content.decode(errors="replace").split("\n")[:-1] or [""]
