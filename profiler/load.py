"""Whether other processes take the processor from what is measured."""

from __future__ import annotations

import os
from collections.abc import Iterable

from pydantic import BaseModel, ConfigDict

from muxtune.support.machine import usable_cores

_LITTLE_LOAD = 0.5
"""Processes beyond the free cores that do not matter: a load average is late and rough."""

_WHOLE_SHARE = 0.9
"""Share of its core above which a rank had it to itself."""


class ProcessorShare(BaseModel):
    """What a rank had of its core while it timed operators."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: int
    computed_s: float
    """Processor time."""
    elapsed_s: float


def busy_machine(ranks: int) -> str | None:
    """A warning before measuring; None where each rank can have a core to itself.

    Args:
        ranks: Processes that will measure at the same time.
    """
    load, cores = os.getloadavg()[0], usable_cores()
    if load <= max(0, cores - ranks) + _LITTLE_LOAD:
        return None
    return (
        f"the machine is busy (load average {load:.1f} on {_count(cores, 'core')}): measuring takes longer, "
        "and its results are less exact"
    )


def taken_cores(shares: Iterable[ProcessorShare]) -> str | None:
    """A note after measuring; None where each rank had its core to itself."""
    shares = [each for each in shares if each.elapsed_s > 0]
    if not shares:
        return None
    least = min(each.computed_s / each.elapsed_s for each in shares)
    if least >= _WHOLE_SHARE:
        return None
    return (
        f"measured on a busy machine: a rank had {least:.0%} of a core while it timed operators; what others "
        "did is left out of times, not out of caches and memory bandwidth"
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
