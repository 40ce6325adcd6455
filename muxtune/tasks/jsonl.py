"""JSONL files of examples: where their lines lie, and the texts of those that are asked for.

A file is read once, in blocks, for its digest and the places of its lines. Only the lines that a run takes
are parsed.
"""

from __future__ import annotations

import hashlib
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from muxtune.support.errors import SpecError, UserError
from muxtune.tasks.records import Text, other_format, parse_line

_BLOCK_BYTES = 1 << 24
_HEAD_BYTES = 1 << 16
_NEWLINE = b"\n"[0]
_WHITE_SPACE = np.frombuffer(b" \t\r\x0b\x0c", np.uint8)
_UTF8_MARK = b"\xef\xbb\xbf"


class _Stamp(NamedTuple):
    """What tells one state of a file from another without reading it."""

    device: int
    inode: int
    size: int
    modified_ns: int
    changed_ns: int


class JsonlFile:
    """The lines of a file that are not blank.

    Args:
        path: Path of the file.
        where: Field that names it, for messages.

    Raises:
        SpecError: The file cannot be read, is of another format, or has no lines.
    """

    def __init__(self, path: Path, where: str) -> None:
        self.path = path
        try:
            descriptor = _open(path, where)
        except OSError as error:
            raise SpecError(where, str(path), f"a readable JSONL file ({error.strerror})") from error
        try:
            self.stamp = _stamp(os.fstat(descriptor))
            lines = _scan(descriptor)
            unlike = other_format(lines.head, path.suffix.lower())
            if unlike is not None:
                raise SpecError(where, str(path), f"a JSONL file in UTF-8, {unlike}")
            self.digest = lines.digest
            self._numbers = _not_blank(descriptor, lines)
        finally:
            os.close(descriptor)
        if not len(self._numbers):
            raise SpecError(where, str(path), "at least one example")
        self._starts, self._ends = lines.starts[self._numbers], lines.ends[self._numbers]

    def __len__(self) -> int:
        """Number of examples."""
        return len(self._numbers)

    def texts(self, positions: NDArray[np.int64]) -> Iterator[Text]:
        """The examples with these numbers (from 0), in the order given.

        Raises:
            UserError: A line is malformed (the message has file, line and reason), or the file has changed.
        """
        changed = f"{self.path} changed while it was read; start again once it is complete"
        spans = np.stack([self._starts[positions], self._ends[positions], self._numbers[positions]], axis=1)
        try:
            descriptor = _open(self.path, str(self.path))
        except OSError as error:
            raise UserError(changed) from error
        try:
            if _stamp(os.fstat(descriptor)) != self.stamp:
                raise UserError(changed)
            for start, end, number in spans.tolist():
                line = os.pread(descriptor, end - start, start)
                yield parse_line(line, f"{self.path}:{number + 1}")
            if _stamp(os.fstat(descriptor)) != self.stamp:
                raise UserError(changed)
        finally:
            os.close(descriptor)


def open_jsonl(path: Path, where: str) -> JsonlFile:
    """The file as it is now; read again only if it has changed since this process last read it.

    Raises:
        SpecError: See :class:`JsonlFile`.
    """
    try:
        now = _stamp(os.stat(path))
    except (OSError, ValueError):
        return JsonlFile(path, where)  # which says why
    known = _KNOWN.get(path)
    if known is not None and known.stamp == now:
        return known
    file = JsonlFile(path, where)
    _KNOWN.pop(path, None)
    if time.time() - max(file.stamp.modified_ns, file.stamp.changed_ns) / 1e9 > _SETTLED_S:
        _KNOWN[path] = file
        if len(_KNOWN) > _KNOWN_FILES:
            del _KNOWN[next(iter(_KNOWN))]
    return file


_KNOWN: dict[Path, JsonlFile] = {}
_KNOWN_FILES = 64
_SETTLED_S = 1.0
"""A file that changed less than this before it was read may change again under the same time stamp."""


def _stamp(status: os.stat_result) -> _Stamp:
    return _Stamp(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def _open(path: Path, where: str) -> int:
    """Descriptor of a regular file; others may never end, or wait for a writer."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except ValueError as error:  # a zero byte in the name
        raise SpecError(where, str(path), f"the path of a JSONL file ({error})") from error
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    kind = "Is a directory; name the file in it" if stat.S_ISDIR(mode) else "Is a pipe or a device"
    raise SpecError(where, str(path), f"a readable JSONL file ({kind})")


class _Lines(NamedTuple):
    """What one pass over a file finds."""

    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    first_bytes: NDArray[np.uint8]
    """First byte of each line; a newline for an empty one at the end of the file."""
    digest: str
    head: bytes


def _scan(descriptor: int) -> _Lines:
    digest = hashlib.sha256()
    newlines: list[NDArray[np.int64]] = []
    first_bytes: list[NDArray[np.uint8]] = []
    size, begins = 0, True
    while block := os.pread(descriptor, _BLOCK_BYTES, size):
        digest.update(block)
        content = np.frombuffer(block, np.uint8)
        here = np.flatnonzero(content == _NEWLINE)
        begun = np.concatenate([[0] if begins else [], here + 1]).astype(np.int64)
        first_bytes.append(content[begun[begun < len(block)]])
        begins = bool(content[-1] == _NEWLINE)
        newlines.append(here + size)
        size += len(block)
    ends = np.concatenate([*newlines, [size]]).astype(np.int64)
    starts = np.concatenate([[0], ends[:-1] + 1])
    firsts = np.concatenate([*first_bytes, np.full(int(begins), _NEWLINE)]).astype(np.uint8)
    head = os.pread(descriptor, _HEAD_BYTES, 0)
    if head.startswith(_UTF8_MARK):
        starts[0] = len(_UTF8_MARK)
        firsts[0] = _WHITE_SPACE[0]  # look at what follows
    return _Lines(starts, ends, firsts, digest.hexdigest(), head)


def _not_blank(descriptor: int, lines: _Lines) -> NDArray[np.int64]:
    """Numbers (from 0) of the lines that hold something."""
    starts, ends = lines.starts, lines.ends
    holds = starts < ends
    for number in np.flatnonzero(holds & np.isin(lines.first_bytes, _WHITE_SPACE)).tolist():
        holds[number] = bool(os.pread(descriptor, ends[number] - starts[number], starts[number]).strip())
    return np.flatnonzero(holds)
