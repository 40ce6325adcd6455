"""Where results are kept that can be had again: profiles of this machine, digests of large files."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """``MUXTUNE_CACHE``, or ``~/.cache/muxtune``; it need not exist yet."""
    named = os.environ.get("MUXTUNE_CACHE")
    return Path(named) if named else Path.home() / ".cache" / "muxtune"
