"""Identity of the operator costs that something was made with."""

from __future__ import annotations

from pydantic import BaseModel

from muxtune.support.strict_models import STRICT


class CostsRef(BaseModel):
    """Which operator costs the plan was made with."""

    model_config = STRICT

    profile_id: str
    device: str
    digest: str
    notes: tuple[str, ...] = ()
    """What is doubtful about these costs for this plan: sentences on where they come from, on what was not
    measured, and on fits that rest on their bounds."""
