"""Operators of a pipeline stage: what is measured, priced and executed, in one vocabulary.

An :class:`Operator` is a kind with dimensions. The runtime implements an :class:`OperatorSuite` (entry point
``muxtune.operators``) that builds the very code it executes, so that the profiler measures that and nothing
else, without importing the runtime.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from muxtune.batches import MicrobatchLayout, Segment, Span
from muxtune.model import ModelSpec
from muxtune.placement import Route
from muxtune.support.registry import Registry

Phase = Literal["fwd", "bwd"]
PHASES: tuple[Phase, Phase] = ("fwd", "bwd")

OPERATOR_DIMS: dict[str, tuple[str, ...]] = {
    "linear": ("in_features", "out_features", "tokens"),
    "lora": ("in_features", "out_features", "r", "tokens"),
    "dropout": ("features", "tokens"),
    "attention": ("sequences", "length"),
    "norm": ("tokens",),
    "activation": ("tokens",),
    "embedding": ("tokens",),
    "head": ("targets",),
    "optimizer": ("tensors", "parameters"),
    "feed": ("sequences",),
    "message": ("bytes",),
    "p2p": ("bytes",),
    "all_reduce": ("bytes", "ranks"),
    "all_gather": ("bytes", "ranks"),
    "reduce_scatter": ("bytes", "ranks"),
    "stage": ("layers", "tasks", "r", "sequences", "length"),
}
"""Dimensions of each kind. Heads, widths and vocabulary come from the backbone.

linear     frozen linear; bwd is the gradient of its input only
lora       one task's low-rank pair on one linear; bwd gives both factors' gradients and the input's
dropout    masks one task's input of one pair; bwd has the mask again, the input and its gradient
attention  rotary embedding (Llama), gather, causal attention and scatter of equal-length sequences
norm       residual addition and norm
activation activation of the MLP with its gate
embedding  token (and position) embedding; fwd only
head       final norm, head and cross-entropy of target tokens
optimizer  one task's step over its adapter on a stage; fwd only
feed       tensors of one micro-batch, from examples and layout; fwd only
message    processor time that sending or receiving one message takes from a rank's actions; fwd only
p2p        transfer to a neighbouring stage, until the message is there; fwd only
all_reduce sum over ranks, which all of them get; fwd only. Bytes are those of the whole tensor in all three
all_gather joins one part from each rank, so that all have the whole; fwd only
reduce_scatter
           sum over ranks, of which each gets one part; fwd only
stage      a whole micro-batch through consecutive middle layers, as the runtime executes it: one packed hTask
           of ``tasks`` tasks, each with ``sequences`` sequences of ``length`` tokens and less (see
           :func:`stage_layout`) and rank ``r`` on every linear (0: no adapter), forward and backward in turn;
           it shows what the sum of the single operators leaves out, and so the fixed cost of an action
"""

DERIVED_DIMS: dict[str, tuple[str, ...]] = {"carried_attention": ("sequences", "queries", "keys")}
"""Dimensions of kinds that no suite builds and no profile has: their prices come from those of other kinds.

carried_attention
           as attention, but the last ``queries`` of the ``keys`` of each sequence alone: the first ones come
           from earlier micro-batches
"""

COLLECTIVE_KINDS = frozenset({"all_reduce", "all_gather", "reduce_scatter"})
"""Kinds in which a whole group of ranks takes part."""

LINK_KINDS = COLLECTIVE_KINDS | {"message", "p2p"}
"""Kinds that use the link between ranks; they are measured between ranks, and no suite builds them."""

FWD_ONLY = LINK_KINDS | {"embedding", "optimizer", "feed"}


def dimensions(kind: str) -> tuple[str, ...]:
    """Names of a kind's dimensions."""
    return OPERATOR_DIMS[kind] if kind in OPERATOR_DIMS else DERIVED_DIMS[kind]


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
