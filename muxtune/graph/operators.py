"""Operators of a pipeline stage: what is measured, priced and executed, in one vocabulary.

An :class:`Operator` is a kind with dimensions (:data:`muxtune.operators.KINDS`). The runtime implements an
:class:`OperatorSuite` (entry point ``muxtune.operators``) that builds the very code it executes, so that the
profiler measures that and nothing else, without importing the runtime.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from muxtune.batches import MicrobatchLayout, Segment, Span
from muxtune.model import ModelSpec
from muxtune.operators import COLLECTIVE_KINDS, FWD_ONLY, LINK_KINDS, PHASES, Operator, Phase
from muxtune.support.registry import Registry

__all__ = [
    "COLLECTIVE_KINDS",
    "FWD_ONLY",
    "LINK_KINDS",
    "OPERATOR_SUITES",
    "PHASES",
    "Operator",
    "OperatorSuite",
    "Phase",
    "stage_layout",
]


def stage_layout(op: Operator) -> MicrobatchLayout:
    """Micro-batch of a ``stage``: ragged, as real ones are, from ``length`` down to half of it."""
    _, tasks, _, sequences, length = op.dims
    lengths = [max(1, length - length * i // (2 * sequences)) for i in range(sequences)]
    spans: list[Span] = []
    segments: list[Segment] = []
    start = 0
    for task in range(tasks):
        first = start
        for sequence, tokens in enumerate(lengths):
            segments.append(Segment(task, sequence, start, tokens, tokens))
            start += tokens
        spans.append(Span(task, first, start))
    return MicrobatchLayout(start, tuple(spans), tuple(segments))


class OperatorSuite(Protocol):
    """Builds runnable operators on a device."""

    def build(
        self, op: Operator, model: ModelSpec, device: str, *, needs_backward: bool = True
    ) -> tuple[Callable[[], object], Callable[[], object] | None]:
        """Forward and backward of one operator with random content.

        The backward may be called again and again after one forward, that of a ``stage`` once after each;
        it is None for kinds that have none. Kinds that need two ranks are not built here.
        """
        ...


OPERATOR_SUITES: Registry[OperatorSuite] = Registry(
    "operator suite", group="muxtune.operators", methods=("build",)
)
