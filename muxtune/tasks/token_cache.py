"""Token ids of the texts of a dataset, made once and kept in a folder.

A file of the folder holds what has been tokenized so far of one dataset with one tokenizer (both by their
digests). It is an uncompressed npz: plain arrays, each with a checksum, so that damage is noticed and mended.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
import zlib
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from muxtune.support.cache import cache_folder
from muxtune.support.files import write_atomically
from muxtune.tasks.jsonl import JsonlFile
from muxtune.tasks.tokenizer import Tokenizer

Ints = NDArray[np.int64]

CACHE_BYTES = 4 << 30
"""Largest size of the folder; what has not been used for longest goes first."""

WORTH_EXAMPLES = 256
"""Fewer than these are tokenized faster than a file is written safely."""

_FORMAT = 1
_BATCH = 4096
"""Texts that are tokenized at once."""


@dataclass(frozen=True, slots=True)
class TextTokens:
    """Tokens of some examples, as far as lengths and special tokens depend on them."""

    positions: Ints
    """Positions of the examples in the file, ascending."""
    prompt: NDArray[np.int32]
    """Tokens of each prompt."""
    completion: NDArray[np.int32]
    """Tokens of each completion."""
    first: NDArray[np.int32]
    """First token of prompt and completion; -1 where there is none."""
    last: NDArray[np.int32]
    """Last token of each completion; -1 where there is none."""

    def rows(self, positions: Ints) -> Ints:
        """Where the examples stand here; anything for those that do not."""
        found = np.searchsorted(self.positions, positions)
        return np.minimum(found, max(len(self.positions) - 1, 0))

    def missing(self, positions: Ints) -> Ints:
        """Positions of the examples that are not here, ascending."""
        if not len(self.positions):
            return np.unique(positions)
        return np.unique(positions[self.positions[self.rows(positions)] != positions])

    def check(self) -> None:
        """``ValueError`` where the arrays do not belong together."""
        same = {len(getattr(self, field.name)) for field in fields(self)}
        if len(same) != 1 or (np.diff(self.positions) <= 0).any():
            raise ValueError("arrays of different lengths, or not ascending")


_NOTHING = TextTokens(np.zeros(0, np.int64), *(np.zeros(0, np.int32) for _ in range(4)))


class TokenizedFile:
    """The tokens of a dataset's texts, without any that a task adds.

    Args:
        file: The dataset.
        tokenizer: Makes the tokens.
        allow_special: Whether control tokens in the texts are recognized.
        folder: Where tokens are kept from run to run; None for nowhere.
    """

    def __init__(
        self, file: JsonlFile, tokenizer: Tokenizer, *, allow_special: bool, folder: Path | None
    ) -> None:
        self._file = file
        self._tokenizer = tokenizer
        self._allow_special = allow_special
        name = f"{_FORMAT} {file.digest} {tokenizer.digest} {allow_special}"
        self._path = folder and folder / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.npz"
        self._known, self._ids = self._load(with_ids=False)
        self._ends: Ints | None = None

    def texts(self, positions: Ints) -> TextTokens:
        """What is known of these examples (ascending, none twice), tokenized if they are not yet."""
        self._tokenize(positions)
        if len(positions) == len(self._known.positions):
            return self._known
        rows = self._known.rows(positions)
        return TextTokens(*(getattr(self._known, field.name)[rows] for field in fields(TextTokens)))

    def ids(self, position: int) -> tuple[Ints, Ints]:
        """Token ids of an example's prompt and of its completion."""
        wanted = np.array([position])
        if self._ids is None:
            before = self._known.positions
            self._known, self._ids = self._load(with_ids=True)
            self._tokenize(before)
        self._tokenize(wanted)
        assert self._ids is not None
        if self._ends is None:
            self._ends = np.cumsum(self._known.prompt.astype(np.int64) + self._known.completion)
        row = int(self._known.rows(wanted)[0])
        end, completion = int(self._ends[row]), int(self._known.completion[row])
        start = end - completion - int(self._known.prompt[row])
        return (
            self._ids[start : end - completion].astype(np.int64),
            self._ids[end - completion : end].astype(np.int64),
        )

    def _tokenize(self, positions: Ints) -> None:
        missing = self._known.missing(positions)
        if not len(missing):
            return
        if self._ids is None:  # to be stored with those that are known, if these are still there
            known = self._known.positions
            self._known, self._ids = self._load(with_ids=True)
            missing = self._known.missing(np.concatenate([known, positions]))
        if not len(missing):
            return
        made, ids = self._make(missing)
        self._known, self._ids = _merged((self._known, self._ids), (made, ids))
        self._ends = None
        if len(missing) >= WORTH_EXAMPLES:
            self._store()

    def _make(self, positions: Ints) -> tuple[TextTokens, NDArray[Any]]:
        """Tokenize examples."""
        parts: list[tuple[list[int], ...]] = []
        ids: list[NDArray[Any]] = []
        for start in range(0, len(positions), _BATCH):
            texts = list(self._file.texts(positions[start : start + _BATCH]))
            flat = list(chain.from_iterable(texts))
            tokens = self._tokenizer.encode_batch(flat, allow_special=self._allow_special)
            prompts, completions = tokens[::2], tokens[1::2]
            parts.append(
                (
                    [len(each) for each in prompts],
                    [len(each) for each in completions],
                    [next(chain(*pair), -1) for pair in zip(prompts, completions, strict=True)],
                    [each[-1] if each else -1 for each in completions],
                )
            )
            ids.append(_small(np.fromiter(chain.from_iterable(tokens), np.int64)))
        columns = (np.array(list(chain.from_iterable(each)), np.int32) for each in zip(*parts, strict=True))
        return TextTokens(positions, *columns), np.concatenate(ids)

    def _load(self, *, with_ids: bool) -> tuple[TextTokens, NDArray[Any] | None]:
        """What is kept in the folder: nothing where that is damaged."""
        nothing = _NOTHING, np.zeros(0, np.uint8) if with_ids else None
        if self._path is None:
            return nothing
        try:
            with np.load(self._path, allow_pickle=False) as kept:
                texts = TextTokens(*(kept[field.name] for field in fields(TextTokens)))
                ids = kept["ids"] if with_ids else None
            texts.check()
            total = int(texts.prompt.sum(dtype=np.int64) + texts.completion.sum(dtype=np.int64))
            if (ids is not None and len(ids) != total) or (texts.positions >= len(self._file)).any():
                return nothing
        except _DAMAGE:
            return nothing
        with suppress(OSError):
            os.utime(self._path)
        return texts, ids

    def _store(self) -> None:
        if self._path is None:
            return
        arrays: dict[str, Any] = {f.name: getattr(self._known, f.name) for f in fields(TextTokens)}
        arrays["ids"] = self._ids

        def write(path: Path) -> None:
            with path.open("wb") as file:
                np.savez(file, **arrays)

        with suppress(OSError):  # a folder that cannot be written costs time, not the run
            write_atomically(self._path, write)
            _trim(self._path.parent)


_DAMAGE = (
    OSError,
    ValueError,
    KeyError,
    EOFError,
    zipfile.BadZipFile,
    zlib.error,
    NotImplementedError,
    MemoryError,
)
"""What reading a damaged npz raises."""


@lru_cache(maxsize=64)
def tokenized_file(
    file: JsonlFile, tokenizer: Tokenizer, allow_special: bool, folder: Path | None
) -> TokenizedFile:
    """The tokens of a dataset, shared by all tasks of this process."""
    return TokenizedFile(file, tokenizer, allow_special=allow_special, folder=folder)


def token_folder() -> Path:
    """Where token ids are kept, in :func:`muxtune.support.cache.cache_folder`."""
    return cache_folder() / "tokens"


def _small(ids: NDArray[np.int64]) -> NDArray[Any]:
    """These numbers in as few bytes as they need."""
    return ids.astype(np.min_scalar_type(int(ids.max(initial=0))))


Tokens = tuple[TextTokens, NDArray[Any]]


def _merged(known: tuple[TextTokens, NDArray[Any] | None], made: Tokens) -> Tokens:
    """Both, in the order of the file."""
    old, old_ids = known
    new, new_ids = made
    assert old_ids is not None
    if not len(old.positions):
        return made
    order = np.argsort(np.concatenate([old.positions, new.positions]), kind="stable")
    columns = [
        np.concatenate([getattr(old, field.name), getattr(new, field.name)])[order]
        for field in fields(TextTokens)
    ]
    counts = np.concatenate([old.prompt + old.completion, new.prompt + new.completion]).astype(np.int64)
    starts = np.cumsum(counts) - counts
    ids = np.concatenate([old_ids, new_ids])
    if (np.diff(order) != 1).any():
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts[order]) - counts[order], counts[order])
        ids = ids[np.repeat(starts[order], counts[order]) + within]
    return TextTokens(*columns), ids


def _trim(folder: Path) -> None:
    """Remove what has not been used for longest, until the folder is small enough."""
    kept = sorted(((path.stat().st_mtime, path) for path in folder.glob("*.npz")), reverse=True)
    total = 0
    for _, path in kept:
        total += path.stat().st_size
        if total > CACHE_BYTES:
            path.unlink(missing_ok=True)
