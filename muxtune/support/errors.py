"""Errors of the project.

A :class:`UserError` is a mistake that the user can mend: the command line prints it as one line and exits
with code 2. Everything else is our own failure (exit code 1).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import TYPE_CHECKING

from muxtune.support.complaints import complaints
from muxtune.support.printable import SHOWN_CHARACTERS, short_repr

if TYPE_CHECKING:
    from pydantic import ValidationError


class MuxTuneError(Exception):
    """Root of all errors raised on purpose."""


class UserError(MuxTuneError):
    """Something the user gave is wrong; the message is one line that says what and where."""


class SpecError(UserError, ValueError):
    """A field has a value that it may not have.

    Args:
        field: Dotted path of the field, with the file in front where there is one.
        value: Value that the field has.
        expected: What would have been right.
    """

    def __init__(self, field: str, value: object, expected: str) -> None:
        super().__init__(field, value, expected)  # all in args: survives pickling between workers

    def __str__(self) -> str:
        field, value, expected = self.args[:3]
        return f"{field} = {short_repr(value)}: expected {expected}"


class NotEnoughMemoryError(SpecError):
    """A plan needs more memory than a rank has.

    Args:
        field: As for a :class:`SpecError`, like the next two.
        value: What there is, as people read it.
        expected: What would have been enough, and the nearest plan that fits.
        needed_bytes: Memory that the plan needs at least.
        nearest_bytes: What the plan needs that is proposed instead, or the least that any near one needs.
    """

    def __init__(
        self, field: str, value: object, expected: str, needed_bytes: int, nearest_bytes: int
    ) -> None:
        Exception.__init__(self, field, value, expected, needed_bytes, nearest_bytes)
        self.needed_bytes = needed_bytes
        self.nearest_bytes = nearest_bytes


@contextmanager
def naming(where: str) -> Iterator[None]:
    """Put a file's or object's name in front of the field of a ``SpecError`` raised inside."""
    try:
        yield
    except SpecError as error:
        field, *others = error.args
        error.args = (f"{where}: {field}", *others)
        raise


class RunError(MuxTuneError):
    """A real execution failed; the message names the rank and the cause."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UserError:
    """Error for a name that is not registered, with the nearest known one."""
    known = sorted(known)
    near = get_close_matches(name[:SHOWN_CHARACTERS], known, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
    return UserError(f"no {kind} named {short_repr(name)}; {hint}")


def spec_error_from(error: ValidationError, where: str) -> SpecError:
    """First complaint of pydantic as one line, with the number of the others.

    Args:
        error: Error that pydantic raised.
        where: File or object that was read.
    """
    first, *others = complaints(error)
    more = f" (and {len(others)} more)" if others else ""
    return SpecError(f"{where}: {first.path}" if first.path else where, first.value, first.expected + more)
