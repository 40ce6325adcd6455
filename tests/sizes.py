"""How many instances a property test plays: some by default, all with ``make test-full``."""

from __future__ import annotations

import os

FULL = os.environ.get("MUXTUNE_TEST_FULL") == "1"


def some_or_all(some: int, all_: int) -> int:
    """``some`` instances, or all of them in a full run."""
    return all_ if FULL else some
