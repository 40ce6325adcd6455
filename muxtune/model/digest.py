"""What of a backbone's directory decides results, in three digests: configuration, tokenizer, weights.

Weights may be a hundred gigabytes, so the digest of a file is kept beside its size and times, and the file is
read again only if one of them has changed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from muxtune.model.config_keys import deciding
from muxtune.model.families import FAMILIES
from muxtune.model.spec import ModelSpec
from muxtune.model.stored import weight_files
from muxtune.support.cache import cache_folder
from muxtune.support.errors import SpecError
from muxtune.support.files import write_text_atomically
from muxtune.support.strict_models import StrictModel

_LOG = logging.getLogger(__name__)

TOKENIZER_FILES = (
    "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json merges.txt "
    "vocab.txt tokenizer.model spiece.model sentencepiece.bpe.model"
).split()
"""Files that transformers makes a tokenizer of."""

_KEPT_FROM_BYTES = 1 << 20
"""Smaller files are read each time."""

_SETTLED_S = 2.0
"""A file that changed so lately may change again within a tick of its clock; its digest is not kept."""

_ANNOUNCED_FROM_BYTES = 1 << 30
"""Reading larger files takes so long that it is said."""

_READERS = 4
"""Files that are read at once."""


class BackboneDigest(StrictModel):
    """SHA-256 of each part of a directory that decides results."""

    config: str
    """Digest of the keys of ``config.json`` that are executed."""
    tokenizer: str | None
    """Digest of the tokenizer's files; null where there are none."""
    weights: str | None
    """Digest of the files with the weights; null where there are none."""

    def first_change(self, now: BackboneDigest) -> str | None:
        """The part that differs, in words. A part that was not there when this was taken may be anything."""
        for part, words in _PARTS.items():
            before = getattr(self, part)
            if before is not None and before != getattr(now, part):
                return words
        return None


_PARTS = {
    "config": "configuration (config.json)",
    "tokenizer": "tokenizer",
    "weights": "weights",
}


def backbone_digest(model: ModelSpec) -> BackboneDigest | None:
    """Digests of a backbone's directory as it is now; None for a preset, which cannot change.

    Raises:
        SpecError: A file cannot be read.
    """
    if model.source == "preset":
        return None
    folder = Path(model.source)
    tokenizer = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    try:
        return BackboneDigest(
            config=_digest(
                deciding(json.loads((folder / "config.json").read_bytes()), FAMILIES[model.family])
            ),
            tokenizer=_digest_files(folder, tokenizer),
            weights=_digest_files(folder, weight_files(folder)),
        )
    except (OSError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise SpecError("model.source", model.source, f"a directory that can be read ({reason})") from error


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _digest_files(folder: Path, files: Iterable[Path]) -> str | None:
    paths = list(files)
    if not paths:
        return None
    with ThreadPoolExecutor(_READERS) as readers:  # hashing lets other threads run
        digests = list(readers.map(_file_digest, paths))
    return _digest([[str(path.relative_to(folder)), each] for path, each in zip(paths, digests, strict=True)])


def _file_digest(path: Path) -> str:
    path = path.resolve()
    status = path.stat()
    stamp = (status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    if status.st_size < _KEPT_FROM_BYTES or time.time() - status.st_ctime < _SETTLED_S:
        return _read_digest(path)
    return _kept_digest(path, stamp)


@lru_cache(maxsize=4096)
def _kept_digest(path: Path, stamp: tuple[int, ...]) -> str:
    name = hashlib.sha256(str(path).encode()).hexdigest()[:32]
    kept = cache_folder() / "digests" / f"{name}.json"
    try:
        content = json.loads(kept.read_bytes())
        if content["path"] == str(path) and tuple(content["stamp"]) == stamp:
            return str(content["sha256"])
    except (OSError, ValueError, KeyError, TypeError):  # not there, or not ours
        pass
    if stamp[0] >= _ANNOUNCED_FROM_BYTES:
        _announce(path.parent)
    digest = _read_digest(path)
    with suppress(OSError):  # no place to keep it: it will be computed again
        write_text_atomically(kept, json.dumps({"path": str(path), "stamp": stamp, "sha256": digest}))
    return digest


@lru_cache(maxsize=64)
def _announce(folder: Path) -> None:
    _LOG.warning("reading the weights in %s for their digest, this once", folder)


def _read_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
