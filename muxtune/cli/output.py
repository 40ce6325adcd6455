"""What a command prints: one result on stdout, everything else on stderr."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pydantic import BaseModel

from muxtune.support.errors import SpecError
from muxtune.support.files import OutputError, written_file
from muxtune.support.printable import printable
from muxtune.support.terminal import fit_text


@contextmanager
def whole_stdout() -> Iterator[None]:
    """See to it that what is printed inside has left us at the end.

    Raises:
        OutputError: It cannot leave, as where the disk is full.
        SystemExit: Whoever read it wants no more.
    """
    try:
        yield
    finally:
        with _written():
            sys.stdout.flush()


def show(text: str) -> None:
    """Print on stdout.

    Raises:
        OutputError: It cannot be written, as where the disk is full.
        SystemExit: Whoever read it wants no more.
    """
    with _written():
        sys.stdout.write(f"{text}\n")


@contextmanager
def _written() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        discard_stdout()
        if error.errno == errno.EPIPE:
            sys.exit(1)
        raise OutputError(f"cannot write stdout: {error.strerror}") from error


def discard_stdout() -> None:
    """Let go what was printed and has not left us; the interpreter would try again as it ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    with suppress(OSError, ValueError):  # in tests, stdout may be no file
        os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


@contextmanager
def planning_bar() -> Iterator[Callable[[int, int], None] | None]:
    """A bar on stderr for a search, where somebody looks at it."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        shown = bar.add_task("planning", total=None)
        yield lambda done, of: bar.update(shown, completed=done, total=of)


def emit(result: BaseModel, text: str, *, as_json: bool, wide: bool = False, styled: bool = False) -> None:
    """Print the result of a command: as JSON for machines, as text for people.

    Args:
        result: What machines read: a model that is written as JSON.
        text: What people read; control characters in it are escaped.
        as_json: Print the result.
        wide: Tables keep their columns where the terminal is too narrow for them, too.
        styled: The text has colours of our own, and nothing of a user that is not escaped.
    """
    show(result.model_dump_json() if as_json else for_people(text, wide=wide, styled=styled))


def written(*paths: Path | None) -> str:
    """A line that says which files a command wrote, with an empty one before it; nothing if none."""
    names = ", ".join(str(path) for path in paths if path is not None)
    return f"\n\nwritten to {names}" if names else ""


def for_people(text: str, *, wide: bool = False, styled: bool = False) -> str:
    """A text as it is printed: fitted to the terminal, if it goes to one, without control characters."""
    shown = text if styled else printable(text, lines=True)
    if wide or not sys.stdout.isatty():
        return shown
    return fit_text(shown, shutil.get_terminal_size().columns)


def check_writable(
    path: Path | None, option: str, *, folder: bool = False, inputs: Iterable[Path | str | None] = ()
) -> None:
    """Refuse an output path that cannot be written, before the work whose result would be lost.

    Args:
        path: Where the output goes; None if it is not wanted.
        option: That has the path, for messages.
        folder: It is a folder.
        inputs: Files that the command reads, or names that may be of files: none of them is replaced.

    Raises:
        SpecError: Names the option.
    """
    if path is None:
        return
    try:
        if path.exists() and path.is_dir() != folder:
            raise SpecError(option, str(path), "a folder" if folder else "a file, not a folder")
        _check_place(path, option)
        target = path if folder else written_file(path)
        if target is not None and target != path:  # behind a link
            _check_place(target, option)
    except OSError as error:
        raise SpecError(option, str(path), f"a place that can be written ({error.strerror})") from error
    for each in inputs:
        if each and path.is_file() and _is_same_file(path, each):
            raise SpecError(option, str(path), f"another file than {each}, which is read")
    if not folder and path.exists() and not os.access(path, os.W_OK):
        raise SpecError(option, str(path), "a file that can be written")


def _is_same_file(path: Path, other: Path | str) -> bool:
    try:
        return path.samefile(other)
    except (OSError, ValueError):  # there is no such file
        return False


def _check_place(path: Path, option: str) -> None:
    """Refuse a path whose folder is none, or can neither be made nor written."""
    ancestor = path.absolute().parent
    while not ancestor.exists():
        ancestor = ancestor.parent
    if not ancestor.is_dir():
        raise SpecError(option, str(path), f"a path inside a folder; {ancestor} is a file")
    if not os.access(ancestor, os.W_OK) and (not path.exists() or path.is_file()):
        raise SpecError(option, str(path), f"a place that can be written; {ancestor} cannot")
