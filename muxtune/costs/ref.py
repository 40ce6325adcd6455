"""Identity of the operator costs that something was made with."""

from __future__ import annotations

from muxtune.support.strict_models import StrictModel


class CostsRef(StrictModel):
    """Which operator costs the plan was made with."""

    profile_id: str
    device: str
    digest: str
    notes: tuple[str, ...] = ()
    """What is doubtful about these costs for this plan: sentences on where they come from, on what was not
    measured, and on fits that rest on their bounds."""
