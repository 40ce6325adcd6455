"""Text to token ids, without special tokens; the dataset adds BOS and EOS itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from muxtune.model import NO_FOREIGN_CODE, ModelSpec
from muxtune.support.errors import SpecError


class Tokenizer(Protocol):
    """What a dataset needs from a tokenizer."""

    bos_id: int | None
    eos_id: int

    def __hash__(self) -> int:
        """Files that have been tokenized are found by it."""
        ...

    @property
    def adds_bos(self) -> bool:
        """Whether the tokenizer itself puts BOS before a text."""
        ...

    @property
    def digest(self) -> str:
        """What decides the ids of a text, as a name under which ids may be kept."""
        ...

    def encode(self, text: str, *, allow_special: bool = True) -> list[int]:
        """Ids of ``text`` alone, without special tokens but those that stand in it.

        Args:
            text: Any text.
            allow_special: Whether ``</s>`` and the like in the text are control tokens, or plain characters.
        """
        ...

    def encode_batch(self, texts: Sequence[str], *, allow_special: bool = True) -> list[list[int]]:
        """:meth:`encode` of several texts at once, which is faster."""
        ...


class ByteTokenizer:
    """One token per UTF-8 byte; needs no download. The tokenizer of the presets.

    A text cannot name its control tokens.
    """

    bos_id: int | None = 256
    eos_id = 257
    digest = "bytes"

    @property
    def adds_bos(self) -> bool:
        """Whether BOS is put before a text: if there is one."""
        return self.bos_id is not None

    def encode(self, text: str, *, allow_special: bool = True) -> list[int]:
        """The bytes of ``text``."""
        return list(text.encode())

    def encode_batch(self, texts: Sequence[str], *, allow_special: bool = True) -> list[list[int]]:
        """The bytes of each text."""
        return [list(text.encode()) for text in texts]


class HfTokenizer:
    """The tokenizer that lies in a Hugging Face directory.

    Raises:
        SpecError: There is none, it needs code of the folder, it has no EOS token, or it knows more ids than
            the backbone.
    """

    def __init__(self, folder: Path, vocab: int) -> None:
        from transformers import AutoTokenizer  # noqa: PLC0415  # seconds to import

        check_tokenizer_code(folder)
        self.digest = tokenizer_digest(folder)
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True
            )
        except (OSError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise SpecError("model", str(folder), f"a directory with its tokenizer ({reason})") from error
        if self._tokenizer.eos_token_id is None:
            raise SpecError(f"{folder}: tokenizer.eos_token", None, "an EOS token")
        if len(self._tokenizer) > vocab:
            raise SpecError(
                f"{folder}: tokenizer size", len(self._tokenizer), f"at most vocab_size ({vocab})"
            )
        self.bos_id: int | None = self._tokenizer.bos_token_id
        self.eos_id: int = self._tokenizer.eos_token_id
        self.adds_bos: bool = self.bos_id is not None and self._tokenizer.encode("")[:1] == [self.bos_id]

    def encode(self, text: str, *, allow_special: bool = True) -> list[int]:
        """Ids of ``text`` alone."""
        return self.encode_batch([text], allow_special=allow_special)[0]

    def encode_batch(self, texts: Sequence[str], *, allow_special: bool = True) -> list[list[int]]:
        """Ids of each text alone."""
        if not texts:
            return []
        ids: list[list[int]] = self._tokenizer(
            list(texts),
            add_special_tokens=False,
            split_special_tokens=not allow_special,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # about texts longer than the backbone's positions: they are cut later
        )["input_ids"]
        return ids


def check_tokenizer_code(folder: Path) -> None:
    """Refuse a tokenizer that its own code would make; what it is without cannot be known.

    Raises:
        SpecError: Names the key.
    """
    where = folder / "tokenizer_config.json"
    try:
        content = json.loads(where.read_bytes()) if where.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise SpecError(
            str(where), "unreadable", f"a JSON object ({' '.join(str(error).split())})"
        ) from error
    if isinstance(content, dict) and content.get("auto_map"):
        raise SpecError(f"{where}: auto_map", content["auto_map"], NO_FOREIGN_CODE)


def load_tokenizer(model: ModelSpec) -> Tokenizer:
    """Bytes for presets, the directory's own tokenizer otherwise; read once while its files stay the same."""
    if model.source == "preset":
        return _BYTES
    folder = Path(model.source)
    return _load(folder, model.vocab, tokenizer_digest(folder))


def tokenizer_digest(folder: Path) -> str:
    """SHA-256 of every file that a tokenizer may read, and of the libraries that read them."""
    digest = hashlib.sha256(f"{version('transformers')} {version('tokenizers')}".encode())
    files = sorted(path for path in folder.glob("*") if path.suffix in _SUFFIXES and path.is_file())
    for path in files:
        if not path.name.endswith(".index.json"):  # of weights
            content = path.read_bytes()
            digest.update(f"\n{path.name} {len(content)}\n".encode())
            digest.update(content)
    return digest.hexdigest()


_BYTES = ByteTokenizer()
_SUFFIXES = {".json", ".txt", ".model", ".tiktoken"}


@lru_cache(maxsize=8)
def _load(folder: Path, vocab: int, _digest: str) -> HfTokenizer:
    return HfTokenizer(folder, vocab)
