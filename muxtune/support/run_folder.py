"""A run's folder as one process's own: locked, watched, and cleaned of what a killed run has left."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir

from muxtune.support.errors import RunError, UserError

LOCK = ".lock"
"""File of a run's folder that is locked while somebody runs there; what it says is for people."""

_MEETING = "muxtune-run-"
_OWNER = "owner"
_OWNERLESS_S = 3600.0
"""How old a folder without a lock has to be before it is taken to be left over."""

_TEMPORARY = re.compile(
    r"\.(plan\.json|progress\.json|from-\d+\.json|backbone\.json|run\.json|trace\.json|losses\.csv|status\.json|adapter_config\.json"
    r"|adapter_model\.safetensors|part-\d+-of-\d+\.safetensors)\.[A-Za-z0-9_]{8}"
)
"""What :func:`muxtune.support.files.write_atomically` has beside a file of a run until that is whole."""


@contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Have a folder, which exists, for this process and those that get the descriptor, until all have ended.

    Yields:
        The descriptor that holds the lock.

    Raises:
        UserError: Another process has it.
    """
    path = folder / LOCK
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _lock(descriptor, path)
        with suppress(OSError):  # a full disk
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {os.uname().nodename}\n".encode(), 0)
        yield descriptor
    finally:
        os.close(descriptor)


def refuse_if_locked(folder: Path) -> None:
    """Refuse a folder that another process runs in.

    Raises:
        UserError: Another process runs in it.
    """
    path = folder / LOCK
    if path.is_file():
        descriptor = os.open(path, os.O_RDWR)
        try:
            _lock(descriptor, path)
        finally:
            os.close(descriptor)


class FolderWatch:
    """Notices that a folder is gone, or that another one has taken its place.

    Args:
        folder: Folder, which is there now.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._inode = folder.stat().st_ino

    def check(self) -> None:
        """Look once.

        Raises:
            RunError: It is gone.
        """
        try:
            same = self._folder.stat().st_ino == self._inode
        except (FileNotFoundError, NotADirectoryError):
            same = False
        if not same:
            raise RunError(f"the run's folder {self._folder} is gone, and with it all that the run had kept")


def remove_temporaries(folder: Path) -> None:
    """Remove half-written files that a killed run has left in its folder, which is locked by us."""
    for path in folder.rglob(".*"):
        if is_temporary(path):
            path.unlink(missing_ok=True)


def is_temporary(path: Path) -> bool:
    """Whether a path of a run's folder is such a half-written file."""
    return bool(_TEMPORARY.fullmatch(path.name)) and path.is_file()


@contextmanager
def meeting_folder() -> Iterator[Path]:
    """A temporary folder in which the ranks of a run meet; those that killed runs have left are removed."""
    _remove_left_meetings()
    with TemporaryDirectory(prefix=_MEETING) as name:
        folder = Path(name)
        descriptor = os.open(folder / _OWNER, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            _lock(descriptor, folder)
            yield folder
        finally:
            os.close(descriptor)


def _remove_left_meetings() -> None:
    for folder in Path(gettempdir()).glob(f"{_MEETING}*"):
        with suppress(OSError, UserError):  # somebody else's, in use, or gone by now
            if folder.is_symlink() or folder.stat().st_uid != os.getuid():
                continue
            if (folder / _OWNER).exists():
                descriptor = os.open(folder / _OWNER, os.O_RDWR)
                try:
                    _lock(descriptor, folder)
                    shutil.rmtree(folder, ignore_errors=True)
                finally:
                    os.close(descriptor)
            elif time.time() - folder.stat().st_mtime > _OWNERLESS_S:
                shutil.rmtree(folder, ignore_errors=True)


def _lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in {errno.EWOULDBLOCK, errno.EACCES}:
            owner = " ".join(os.pread(descriptor, 200, 0).decode(errors="replace").split())
            who = f" ({owner})" if owner else ""
            raise UserError(f"{path.parent} is in use by another run{who}; wait for its end") from error
        warnings.warn(f"{path} cannot be locked: {error.strerror}", stacklevel=2)
