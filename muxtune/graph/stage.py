"""Everything that a stage does for one action: feed or messages, embedding, layers, head."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from muxtune.graph.layer import Launching, layer_graph
from muxtune.graph.microbatch_work import MicrobatchWork
from muxtune.graph.nodes import Node, Role, StageGraph
from muxtune.graph.operators import Operator, Phase
from muxtune.model import DTYPE_BYTES, ModelSpec

Part = Literal["feed", "receive", "embedding", "layer", "first layer", "head", "send"]
"""``first layer`` is the backward of the first layer of all; in the forward it is a layer like all others."""

_ALMOST_NONE = 1e-9
"""Number of targets that stands for none: it costs nothing."""

_LOSS_NUMBERS = 3
"""Numbers per target that ranks with parts of the vocabulary put together: largest logit, then sum of
exponentials and the target's logit."""
_LOSS_CALLS = 2
"""Collectives that these numbers take."""


def stage_parts(layers: int, *, first: bool, last: bool, phase: Phase) -> tuple[tuple[Part, int], ...]:
    """Parts of an action in the order of execution, and how often each runs in a row.

    Args:
        layers: Layers that the stage holds, at least one.
        first: Whether the stage begins with the embedding.
        last: Whether it ends with the head.
        phase: ``fwd`` for an F, ``bwd`` for a B.
    """
    parts: list[tuple[Part, int]]
    if phase == "fwd":
        parts = [("feed", 1), ("embedding" if first else "receive", 1), ("layer", layers)]
        return (*parts, ("head" if last else "send", 1))
    parts = [("head" if last else "receive", 1), ("layer", layers - first)]
    return (*parts, ("first layer" if first else "send", 1))


def part_graph(
    part: Part,
    model: ModelSpec,
    work: MicrobatchWork,
    phase: Phase,
    *,
    tp: int = 1,
    adapters: Launching = "grouped",
) -> tuple[Node, ...]:
    """Nodes of one part; arguments as of :func:`stage_graph`."""
    if part in {"layer", "first layer"}:
        return layer_graph(model, work, phase, tp=tp, input_gradient=part == "layer", adapters=adapters)
    if part == "feed":
        return _mixed("feed", work.sequences, role="host")
    if part == "embedding":
        return _with_sum(
            Node(Operator("embedding", (work.tokens,)), "base"), message_bytes(model, work.tokens), tp
        )
    if part == "head":
        return _head(model, work.targets, phase, tp)
    return (Node(Operator("message", (message_bytes(model, work.tokens),)), "host"),)


def stage_graph(
    model: ModelSpec,
    layers: int,
    *,
    first: bool,
    last: bool,
    work: MicrobatchWork,
    phase: Phase,
    tp: int = 1,
    adapters: Launching = "grouped",
) -> StageGraph[Node]:
    """Graph of one action of a stage, as one of its ``tp`` ranks runs it.

    Args:
        model: The backbone, whole.
        layers: Layers that the stage holds, at least one.
        first: Whether the stage begins with the embedding.
        last: Whether it ends with the head.
        work: The micro-batch.
        phase: ``fwd`` for an F, ``bwd`` for a B.
        tp: Tensor-parallel ranks.
        adapters: How those of several tasks at one base op are launched.

    Raises:
        SpecError: The backbone cannot be split into so many parts.
    """
    parts = (
        (part_graph(part, model, work, phase, tp=tp, adapters=adapters), repeats)
        for part, repeats in stage_parts(layers, first=first, last=last, phase=phase)
        if repeats
    )
    return StageGraph(tuple((nodes, repeats) for nodes, repeats in parts if nodes), tp)


def message_bytes(model: ModelSpec, tokens: int) -> int:
    """Hidden states of a micro-batch, or their gradients."""
    return tokens * model.hidden * model.dtype_bytes


def _with_sum(node: Node, bytes_: int, tp: int) -> tuple[Node, ...]:
    """A node, and the sum of its results over the ranks."""
    if tp == 1:
        return (node,)
    return node, Node(Operator("all_reduce", (bytes_, tp)), "communication", (0,))


def _head(model: ModelSpec, targets: float, phase: Phase, tp: int) -> tuple[Node, ...]:
    """Forward and loss, or the gradient of the hidden states; the vocabulary is split."""
    if tp == 1:
        return _mixed("head", targets)
    # Ranks meet for the loss also where nothing is predicted: what is launched does not depend on the data.
    targets = max(targets, _ALMOST_NONE)
    head = _mixed("head", targets)
    # Loss in float32 or better; gradients of the targets' hidden states in the backbone's dtype.
    loss_bytes = max(model.dtype_bytes, DTYPE_BYTES["float32"])
    each, times = model.hidden * model.dtype_bytes, 1
    if phase == "fwd":
        each, times = loss_bytes * _LOSS_NUMBERS // _LOSS_CALLS, _LOSS_CALLS
    deps = tuple(range(len(head)))
    sums = _mixed("all_reduce", targets, each, (tp,), role="communication")
    return head + tuple(Node(node.op, node.role, deps, times * node.count) for node in sums)


def _mixed(
    kind: str, amount: float, each: int = 1, others: Sequence[int] = (), *, role: Role = "base"
) -> tuple[Node, ...]:
    """An operator whose first dimension is an average: a mixture of the two whole sizes around it."""
    below = math.floor(amount)
    above = amount - below
    mixture = ((below, 1.0 - above), (below + 1, above))
    return tuple(
        Node(Operator(kind, (size * each, *others)), role, (), share)
        for size, share in mixture
        if size and share
    )
