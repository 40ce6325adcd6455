"""Identity of the operator costs that something was made with."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from muxtune.support.strict_models import StrictModel

CostsKind = Literal["measured", "fitted", "estimated"]


class CostsRef(StrictModel):
    """Which operator costs the plan was made with."""

    kind: CostsKind = "measured"
    """``measured``: a profile of this backbone; ``fitted``: coefficients that ship, or a formula;
    ``estimated``: what was measured of another backbone, or in a few seconds."""
    profile_id: str
    """Name of a profile, or of coefficients that ship."""
    device: str
    """Device that they are of."""
    digest: str
    """SHA-256 of everything that prices depend on."""
    usual_error: float | None = Field(default=None, ge=0)
    """Mean error of iteration times by such estimates, relative to those by a profile; null for others, and
    where it was not measured."""

    @property
    def mark(self) -> str | None:
        """What to say beside times by estimates; None of other costs."""
        if self.kind != "estimated":
            return None
        off = "" if self.usual_error is None else f", which are usually off by {self.usual_error:.0%}"
        return f"by estimated costs{off}"
