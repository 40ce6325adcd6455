"""An operator at a shape."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from muxtune.operators.kinds import dimensions
from muxtune.placement import Route


@dataclass(frozen=True, slots=True)
class Operator:
    """An operator at a shape."""

    kind: str
    dims: tuple[int, ...]
    route: Route | None = None
    """Links that a transfer or collective takes. Without one, collectives are among the first ranks of the
    cluster, as shards are, and transfers over the slowest link between neighbours."""

    def __post_init__(self) -> None:
        assert len(self.dims) == len(dimensions(self.kind)), (self.kind, self.dims)

    def __str__(self) -> str:
        return f"{self.kind}{self.dims}"


@lru_cache(maxsize=1 << 16)
def operator(kind: str, *dims: int) -> Operator:
    """An operator; equal ones are one object, as a search asks for the same ones again and again."""
    return Operator(kind, dims)


@dataclass(frozen=True, slots=True)
class OperatorShape:
    """An operator of a kind whose last dimension is tokens, before they are known."""

    kind: str
    dims: tuple[int, ...]
    """All dimensions but the tokens."""

    def at(self, tokens: int) -> Operator:
        """The operator with so many tokens."""
        return operator(self.kind, *self.dims, tokens)
