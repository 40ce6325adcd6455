"""Vocabulary of operators: kinds with their dimensions and work, and an operator at a shape."""

from muxtune.operators.kinds import (
    COLLECTIVE_KINDS,
    FROZEN_KINDS,
    FWD_ONLY,
    KINDS,
    LINK_KINDS,
    MOST_DIMS,
    PHASES,
    GpuWork,
    OperatorKind,
    OperatorWork,
    Phase,
    add_kinds,
    dimensions,
)
from muxtune.operators.operator import Operator, OperatorShape, operator

__all__ = [
    "COLLECTIVE_KINDS",
    "FROZEN_KINDS",
    "FWD_ONLY",
    "KINDS",
    "LINK_KINDS",
    "MOST_DIMS",
    "PHASES",
    "GpuWork",
    "Operator",
    "OperatorKind",
    "OperatorShape",
    "OperatorWork",
    "Phase",
    "add_kinds",
    "dimensions",
    "operator",
]
