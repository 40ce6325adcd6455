"""Files that users hand in: read without hanging, whatever their names lead to."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

from muxtune.support.errors import SpecError, UserError
from muxtune.support.files import follow_links
from muxtune.support.numbers import number_with_exponent
from muxtune.support.printable import short_repr

_MIB = 2**20


def read_user_bytes(path: Path, what: str, *, most_mib: int | None = None) -> bytes:
    """Content of a user's file.

    A device, or a FIFO that nobody may ever write, is refused; a pipe that is open already (``/dev/stdin``,
    ``<(command)`` of a shell) is read to its end.

    Args:
        path: The file.
        what: Name of the content in messages: ``the workload``.
        most_mib: Larger ones are refused.

    Raises:
        UserError: It cannot be read, is no regular file, or is larger.
    """
    unreadable = f"cannot read {what} {path}"
    try:
        kind = path.stat().st_mode
        if stat.S_ISDIR(kind):
            raise UserError(f"{unreadable}: Is a directory")
        if not stat.S_ISREG(kind) and not (stat.S_ISFIFO(kind) and follow_links(path)[1] is not None):
            raise UserError(f"{unreadable}: expected a regular file")
        with path.open("rb") as file:
            content = file.read() if most_mib is None else file.read(most_mib * _MIB + 1)
    except OSError as error:
        raise UserError(f"{unreadable}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{unreadable}: a NUL in its name") from error
    if most_mib is not None and len(content) > most_mib * _MIB:
        raise UserError(f"{unreadable}: it has more than {most_mib} MiB")
    return content


def check_regular(path: Path, what: str) -> None:
    """Refuse a device or a FIFO, for readers that open by name and say themselves what else is wrong.

    Raises:
        UserError: Names the file.
    """
    try:
        kind = path.stat().st_mode
    except (OSError, ValueError):
        return
    if not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):
        raise UserError(f"cannot read {what} {path}: expected a regular file")


def expand_user(path: Path, field: str) -> Path:
    """The path with ``~`` replaced.

    Raises:
        SpecError: There is no such user, or no file can have that name.
    """
    if "\0" in str(path):
        raise SpecError(field, str(path), "a path without NUL")
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise SpecError(field, str(path), "the home of a user that exists") from error


def is_folder(path: Path) -> bool:
    """Whether there is such a folder; False, too, for what no name can be."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def parse_json(content: bytes, where: str) -> object:
    """A value in JSON, in which every key of an object stands once.

    Args:
        content: Content of the whole file.
        where: Name of the file in messages.

    Raises:
        UserError: It is not one value in UTF-8, has a key twice, or is nested too deeply.
    """

    def mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        whole = dict(pairs)
        if len(whole) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise UserError(
                f"{where}: the key {short_repr(twice)} stands twice in one object: expected every key once"
            )
        return whole

    try:
        return json.loads(content.decode(), object_pairs_hook=mapping, parse_float=number_with_exponent)
    except RecursionError as error:
        raise UserError(f"{where} is nested too deeply") from error
    except ValueError as error:  # of the parser, or an integer of more digits than Python reads
        reason = "an integer of thousands of digits" if "digits" in str(error) else error
        raise UserError(f"{where} is not a whole JSON file: {reason}") from error
