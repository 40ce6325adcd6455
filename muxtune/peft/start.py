"""A task that starts from a saved adapter: a folder in peft's format, checked before anything is trained."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from muxtune.support.errors import SpecError, UserError
from muxtune.support.user_files import parse_json, read_user_bytes

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""Files of a saved adapter."""


def read_start(folder: Path, field: str) -> Mapping[str, Any]:
    """The configuration of a saved adapter.

    Args:
        folder: The adapter.
        field: Field that names it, for messages.

    Raises:
        SpecError: The folder is none, or has no such files.
    """
    expected = f"a folder with {CONFIG} and {WEIGHTS}, as peft saves an adapter"
    if not (folder / WEIGHTS).is_file():
        raise SpecError(field, str(folder), expected)
    try:
        content = parse_json(read_user_bytes(folder / CONFIG, "the adapter's configuration"), CONFIG)
    except UserError as error:
        raise SpecError(field, str(folder), f"{expected} ({error})") from error
    if not isinstance(content, dict):
        raise SpecError(field, str(folder), f"{expected}, and the first is no object")
    return content


def start_digest(folder: Path, field: str) -> str:
    """Digest of a saved adapter: of both files, one after the other (``SpecError`` where one is missing)."""
    read_start(folder, field)
    digest = hashlib.sha256((folder / CONFIG).read_bytes())
    with (folder / WEIGHTS).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_said(
    config: Mapping[str, Any], said: Mapping[str, object], silent: frozenset[str], folder: Path, where: str
) -> None:
    """Refuse a configuration that says something else than a task.

    Args:
        config: Configuration of the saved adapter.
        said: What the task says, by peft's names.
        silent: Keys that do not matter, or that are compared elsewhere.
        folder: The adapter.
        where: Field of the task's method, for messages.

    Raises:
        SpecError: Names the first key that differs; a key that is not known here may say nothing.
    """
    for key, value in said.items():
        if config.get(key, value) != value:
            expected = f"an adapter with {key} {value!r} as the task has it, and not {config[key]!r}"
            raise SpecError(f"{where}.init", str(folder), expected)
    for key, value in config.items():
        if key not in said and key not in silent and value not in (None, False, [], {}, ""):
            raise SpecError(f"{where}.init", str(folder), f"an adapter without {key}, which is not executed")
