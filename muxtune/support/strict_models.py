"""What models of files have in common: how strictly pydantic reads them."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field

STRICT = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)  # JSON has neither

MOST_SECONDS = 1e9
"""Longest time in a plan, about thirty years: more is a slip, and sums of it would leave the floats."""

Seconds = Annotated[float, Field(gt=0, le=MOST_SECONDS)]
"""A duration of something that is done; nothing takes no time."""
