"""Files that are written: whole or absent where they can be, written through where they cannot.

A regular file gets its new content in one step: the content goes into a temporary file beside it, which then
takes its name. A device, a FIFO or an open descriptor (``/dev/stdout``) has a name that is not ours to take:
the content goes through it. Symbolic links are followed, so the name that a link has is kept as well.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from muxtune.support.errors import UserError

_MOST_LINKS = 40
"""Symbolic links in a row, as Linux follows them."""

_NAME_CHARACTERS = 32
"""Characters of a file's name that its temporary file bears; a whole name would be too long with what is
added."""

_STDOUT = 1

_moved: dict[int, int] = {}
"""Descriptors that stand for others at present, see :func:`descriptor_moved`."""


class OutputError(UserError, OSError):
    """A file cannot be written; the message names it and says why."""


def write_atomically(path: Path, write: Callable[[Path], object], *, what: str = "") -> None:
    """Let ``write`` fill a temporary file, and give its content to ``path``.

    A regular file is replaced in one step: the data is on disk before the name changes, so a crash leaves the
    old file or the new one. It keeps its mode and owner; a new one has the mode that the umask leaves. What
    is no regular file is written through.

    Args:
        path: Missing folders above it are made.
        write: Gets the temporary file.
        what: The file is, for messages: ``the profile``.

    Raises:
        OutputError: It cannot be written. What else ``write`` raises passes through.
    """
    if "\0" in str(path):
        raise OutputError(f"cannot write {path}: a NUL in its name")
    named = partial(_named, f"{what} {path}".strip())
    with named():
        target = written_file(path)
        if target is not None:
            target.parent.mkdir(parents=True, exist_ok=True)
            former = _former(target)
            temporary = _create_beside(target)
    if target is None:
        with named():
            _write_through(path, write)
        return
    try:
        with named():
            write(temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            if former is not None:
                _take_after(former, temporary)
            temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def write_text_atomically(path: Path, text: str) -> None:
    """Text version of :func:`write_atomically`, in UTF-8."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def written_file(path: Path) -> Path | None:
    """The regular file, there already or still to be made, that is written under a name.

    Returns:
        ``path`` with its symbolic links followed; None if it leads to a device, a FIFO, a socket or an open
        descriptor.

    Raises:
        OSError: The links go round in circles, it is a folder, or a folder on the way cannot be read.
    """
    target, descriptor = follow_links(path)
    if descriptor is not None:
        return None
    try:
        kind = target.stat().st_mode
    except FileNotFoundError:
        return target
    if stat.S_ISDIR(kind):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    return target if stat.S_ISREG(kind) else None


def follow_links(path: Path) -> tuple[Path, int | None]:
    """Where symbolic links lead, and the descriptor if it is an open one.

    ``/dev/stdout`` leads to ``/proc/self/fd/1``: the link behind that name is not for following, as the file
    that it shows is already open, at its own place and perhaps without a name.
    """
    own = {"/dev/fd", f"/proc/{os.getpid()}/fd"}
    for _ in range(_MOST_LINKS):
        if path.name.isdecimal() and os.path.realpath(path.parent) in own:
            return path, int(path.name)
        if not path.is_symlink():
            break
        path = path.parent / path.readlink()
    return path, None


@contextmanager
def descriptor_moved(descriptor: int, to: int) -> Iterator[None]:
    """While ``descriptor`` (stdout's) is lent to something else, write through ``to`` under its names."""
    _moved[descriptor] = to
    try:
        yield
    finally:
        del _moved[descriptor]


def file_name(text: str) -> str:
    """A user's name for something as part of a file's name: without separators, and not too long."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", text)[:64].lstrip(".") or "unnamed"


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Name the file in what the system says."""
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"cannot write {name}: {error.strerror or error}") from error


def _former(target: Path) -> os.stat_result | None:
    """The file that is replaced; None if there is none.

    Raises:
        PermissionError: It may not be written, even if its folder may.
    """
    try:
        former = target.stat()
    except FileNotFoundError:
        return None
    if not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    return former


def _create_beside(target: Path) -> Path:
    """An empty file in the same folder, with the mode that the umask leaves to new files."""
    while True:
        name = f".{target.name[:_NAME_CHARACTERS]}.{secrets.token_hex(4)}"
        try:
            os.close(os.open(target.parent / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        except FileExistsError:
            continue
        return target.parent / name


def _take_after(former: os.stat_result, temporary: Path) -> None:
    """Give a file the owner and mode of the one that it replaces."""
    own = temporary.stat()
    if (own.st_uid, own.st_gid) != (former.st_uid, former.st_gid):
        with suppress(PermissionError):  # only root gives files away
            os.chown(temporary, former.st_uid, former.st_gid)
    temporary.chmod(stat.S_IMODE(former.st_mode))


def _write_through(path: Path, write: Callable[[Path], object]) -> None:
    with tempfile.TemporaryDirectory(prefix="muxtune-") as folder:
        temporary = Path(folder) / f"content{path.suffix}"  # some writers look at the suffix
        write(temporary)
        with temporary.open("rb") as content, os.fdopen(_open_through(path), "wb") as out:
            shutil.copyfileobj(content, out)


def _open_through(path: Path) -> int:
    target, descriptor = follow_links(path)
    if descriptor is None:
        return os.open(target, os.O_WRONLY)
    if descriptor == _STDOUT:
        sys.stdout.flush()  # what was printed before stands before it
    return os.dup(_moved.get(descriptor, descriptor))
