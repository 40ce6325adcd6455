"""Numbers of tensor-parallel ranks that a backbone can be dealt out to (arXiv 1909.08053)."""

from __future__ import annotations

from muxtune.model.spec import ModelSpec
from muxtune.support.errors import SpecError


def sharding_obstacle(spec: ModelSpec, tp: int) -> str | None:
    """What a number of ranks would have to be instead, as heads, MLP or vocabulary want it; None if it is."""
    if tp < 1 or spec.heads % tp:
        return f"a divisor of {spec.heads}, the heads of {spec.name}"
    if spec.kv_heads % tp and tp % spec.kv_heads:
        return f"a divisor or a multiple of {spec.kv_heads}, the key and value heads of {spec.name}"
    if tp > min(spec.ffn, spec.vocab):
        return f"at most {min(spec.ffn, spec.vocab)}, the smaller of MLP width and vocabulary"
    return None


def check_sharding(spec: ModelSpec, tp: int) -> None:
    """Refuse a number of ranks that the heads, the MLP or the vocabulary cannot be dealt out to.

    Raises:
        SpecError: Names ``parallelism.tp`` and what would divide.
    """
    obstacle = sharding_obstacle(spec, tp)
    if obstacle is not None:
        raise SpecError("parallelism.tp", tp, obstacle)
