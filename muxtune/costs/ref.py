"""Identity of the operator costs that something was made with."""

from __future__ import annotations

from muxtune.support.strict_models import StrictModel


class CostsRef(StrictModel):
    """Which operator costs the plan was made with."""

    profile_id: str
    """Name of a profile, or of coefficients that ship."""
    device: str
    """Device that they are of."""
    digest: str
    """SHA-256 of everything that prices depend on."""
