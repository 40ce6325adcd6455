"""Text to token ids, without special tokens; the dataset adds BOS and EOS itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

from muxtune.errors import SpecError
from muxtune.model import NO_FOREIGN_CODE, ModelSpec


class Tokenizer(Protocol):
    """What a dataset needs from a tokenizer."""

    bos_id: int | None
    eos_id: int

    def encode(self, text: str) -> list[int]:
        """Ids of ``text`` alone, without special tokens."""
        ...


class ByteTokenizer:
    """One token per UTF-8 byte; needs no download. The tokenizer of the presets."""

    bos_id: int | None = 256
    eos_id = 257

    def encode(self, text: str) -> list[int]:
        """The bytes of ``text``."""
        return list(text.encode())


class HfTokenizer:
    """The tokenizer that lies in a Hugging Face directory.

    Raises:
        SpecError: There is none, it needs code of the folder, it has no EOS token, or it knows more ids than
            the backbone.
    """

    def __init__(self, folder: Path, vocab: int) -> None:
        from transformers import AutoTokenizer  # noqa: PLC0415  # seconds to import

        check_tokenizer_code(folder)
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

    def encode(self, text: str) -> list[int]:
        """Ids of ``text`` alone."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
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
    """Bytes for presets, the directory's own tokenizer otherwise."""
    if model.source == "preset":
        return ByteTokenizer()
    return HfTokenizer(Path(model.source), model.vocab)
