"""The identity of costs that somebody else wrote: what they say about some operators is part of it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import fields, is_dataclass

from muxtune.costs.ref import CostsRef
from muxtune.operators import KINDS, PHASES, Operator, Phase
from muxtune.support.errors import UserError

_MIB = 1 << 20

_FROZEN: tuple[Operator, ...] = (
    *(Operator("linear", (4096, out_features, 512)) for out_features in (4096, 11008)),
    Operator("dropout", (4096, 512)),
    Operator("attention", (4, 512)),
    Operator("carried_attention", (4, 128, 512)),
    *(Operator(kind, (512,)) for kind in ("norm", "activation", "embedding", "head")),
    Operator("optimizer", (64, _MIB)),
    Operator("feed", (8,)),
    *(Operator(kind, (_MIB,)) for kind in ("message", "p2p")),
    *(Operator(kind, (_MIB, 2)) for kind in ("all_reduce", "all_gather", "reduce_scatter")),
)
"""An operator of every kind of the backbone, at sizes that are usual."""


def samples() -> tuple[Operator, ...]:
    """An operator of every kind, at sizes that are usual."""
    return _FROZEN + tuple(Operator(name, dims) for name, kind in KINDS.items() for dims in kind.samples)


SecondsOf = Callable[[Operator, Phase], float]


def own_ref(costs: object, ref: CostsRef, seconds_of: SecondsOf) -> CostsRef:
    """Identity of costs that begin with others: their class, its plain settings, and sampled prices.

    Args:
        costs: Costs of a class of somebody's own.
        ref: Identity of what they begin with.
        seconds_of: What they make of an operator.
    """
    cls = type(costs)
    content = f"{ref.digest} {cls.__module__}.{cls.__qualname__} {_settings(costs)} {_sampled(seconds_of)}"
    digest = hashlib.sha256(content.encode()).hexdigest()
    return ref.model_copy(
        update={"profile_id": f"{ref.profile_id}+{cls.__name__}-{digest[:12]}", "digest": digest}
    )


def _settings(costs: object) -> list[tuple[str, object]]:
    """Values with a text that is the same in every process."""
    names = [field.name for field in fields(costs)] if is_dataclass(costs) else sorted(vars(costs))
    found = ((name, getattr(costs, name)) for name in names if not name.startswith("_"))
    return [(name, value) for name, value in found if isinstance(value, bool | int | float | str | tuple)]


def _sampled(seconds_of: SecondsOf) -> list[float | None]:
    """Prices of the samples; None where there is none."""

    def priced(op: Operator, phase: Phase) -> float | None:
        try:
            return float(seconds_of(op, phase))
        except UserError:  # over a link that nobody measured
            return None

    return [priced(op, phase) for op in samples() for phase in PHASES]
