"""Rotary tables that are executed: those that do not change with the length."""

from __future__ import annotations

from pathlib import Path

from muxtune.model.families.family import Fields, says_nothing
from muxtune.support.errors import SpecError

ROPE: dict[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor"}),
}
"""Rotary tables by ``rope_type``, and the keys that each reads."""

_ROPE_COMMON = frozenset({"rope_type", "type", "rope_theta", "original_max_position_embeddings"})


def check_rope(rope: Fields, where: Path) -> None:
    """Refuse rotary tables that change with the length, and parameters that their type does not read.

    Raises:
        SpecError: Names the key.
    """
    field, kind = f"{where}: rope_parameters", rope.get("rope_type")
    if not isinstance(kind, str) or kind not in ROPE:
        expected = "default, linear or llama3: tables that do not change with the length"
        raise SpecError(f"{field}.rope_type", kind, expected)
    if rope.get("partial_rotary_factor") not in (None, 1.0):
        expected = "1.0: heads are rotated whole"
        raise SpecError(f"{field}.partial_rotary_factor", rope["partial_rotary_factor"], expected)
    known = ROPE[kind] | _ROPE_COMMON | {"partial_rotary_factor"}
    for key, value in rope.items():
        if key not in known and not says_nothing(value):
            raise SpecError(f"{field}.{key}", value, f"no key that rope_type {kind} does not read")
