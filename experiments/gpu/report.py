"""The report of the GPU check: sections that are put together to one Markdown file."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from muxtune.support.files import write_text_atomically


class Section(BaseModel):
    """What one part of the check found."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str
    """Title with the verdict in it."""
    text: str
    """Markdown."""
    ok: bool


def write_report(out: Path, device: str, sections: Sequence[Section]) -> None:
    """The findings as Markdown.

    Args:
        out: The file; whole or absent.
        device: What was checked, in words.
        sections: Sections in their order.
    """
    versions = ", ".join(
        [f"Python {platform.python_version()}"]
        + [f"{name} {_version(name)}" for name in ("torch", "triton", "transformers", "peft", "muxtune")]
    )
    parts = [
        "# GPU report",
        f"{device}; {versions}; {datetime.now(UTC):%Y-%m-%d}. Written by `make gpu-check`.",
    ]
    for section in sections:
        parts += [f"## {section.title}", section.text]
    write_text_atomically(out, "\n\n".join(parts) + "\n")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"
