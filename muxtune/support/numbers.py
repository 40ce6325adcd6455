"""Numbers as people write them in files."""

from __future__ import annotations

_MOST = 2.0**63
"""Beyond the whole numbers that any field takes."""


def number_with_exponent(text: str) -> int | float:
    """Value of a number that has a point or an exponent; a whole value with an exponent is a whole number.

    ``80e9`` and ``1.5e9`` can stand for bytes, then; ``6.0`` is no whole number.
    """
    value = float(text)
    if "e" in text.lower() and value.is_integer() and abs(value) < _MOST:
        return int(value)
    return value
