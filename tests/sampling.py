"""How many instances of a property a test run looks at."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeVar

FULL = os.environ.get("MUXTUNE_TESTS") == "full"
"""Whether all instances are asked for (``make test-full``); otherwise some, spread over all of them."""

Case = TypeVar("Case")


def sampled(cases: Sequence[Case], every: int) -> list[Case]:
    """All cases in a full run; else the first one and every so many-th after it."""
    return list(cases if FULL else cases[::every])


def in_full(*cases: Case) -> list[Case]:
    """Cases of a full run alone, as others make the same claim."""
    return list(cases if FULL else ())


def examples(count: int) -> int:
    """How many examples of a property hypothesis draws: this many in a full run, else a quarter."""
    return count if FULL else max(count // 4, 10)
