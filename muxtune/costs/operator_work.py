"""How much work an operator is, as :data:`muxtune.operators.KINDS` counts it."""

from __future__ import annotations

from muxtune.model import ModelSpec
from muxtune.operators import KINDS, Operator, OperatorWork, Phase

__all__ = ["OperatorWork", "operator_work"]


def operator_work(op: Operator, phase: Phase, model: ModelSpec) -> OperatorWork:
    """Work of one operator, for every kind but ``stage``, which is composed of the others."""
    work = KINDS[op.kind].work
    assert work is not None, f"{op} is composed of others"
    return work(op.dims, phase, model)
