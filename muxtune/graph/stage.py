"""Everything that a stage does for one action: feed or messages, embedding, layers, head."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

from muxtune.graph.layer import Launching, layer_graph
from muxtune.graph.microbatch_work import MicrobatchWork
from muxtune.graph.nodes import Node, Role, StageGraph
from muxtune.model import DTYPE_BYTES, ModelSpec
from muxtune.operators import Operator, Phase
from muxtune.peft import Layers, Specs, backward_layers, embedding_attachments, runs_of

PartKind = Literal["feed", "receive", "embedding", "layer", "head", "send"]


class Part(NamedTuple):
    """A part of an action."""

    kind: PartKind
    layer: int = 0
    """Number of a layer that it is like."""
    trained: int | None = None
    """Depth of the first trained thing of all, in the backward of the layer that has it."""


_ALMOST_NONE = 1e-9
"""Number of targets that stands for none: it costs nothing."""

_LOSS_NUMBERS = 3
"""Numbers per target that ranks with parts of the vocabulary put together: largest logit, then sum of
exponentials and the target's logit."""
_LOSS_CALLS = 2
"""Collectives that these numbers take."""


@lru_cache(maxsize=1 << 14)
def stage_parts(
    model: ModelSpec, layers: Layers, pefts: Specs, *, first: bool, last: bool, phase: Phase
) -> tuple[tuple[Part, int], ...]:
    """Parts of an action in the order of execution, and how often each runs in a row.

    Args:
        model: The backbone.
        layers: Layers that the stage holds, at least one.
        pefts: Methods of the hTask's tasks.
        first: Whether the stage begins with the embedding. Its backward ends at the first trained thing.
        last: Whether it ends with the head.
        phase: ``fwd`` for an F, ``bwd`` for a B.
    """
    runs = runs_of(layers)
    parts: list[tuple[Part, int]]
    if phase == "fwd":
        parts = [(Part("feed"), 1), (Part("embedding" if first else "receive"), 1)]
        parts += [(Part("layer", layer), n) for layer, n in runs]
        return (*parts, (Part("head" if last else "send"), 1))
    whole, begin, depth = backward_layers(model, pefts, runs, first=first)
    parts = [(Part("head" if last else "receive"), 1)]
    parts += [(Part("layer", layer), n) for layer, n in reversed(whole)]
    if begin is not None:
        parts.append((Part("layer", begin[0], depth), 1))
    if first and any(embedding_attachments(peft, model) for peft in pefts):
        parts.append((Part("embedding"), 1))
    return tuple(parts) if first else (*parts, (Part("send"), 1))


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
    if part.kind == "layer":
        return layer_graph(
            model, work, phase, tp=tp, layer=part.layer, trained=part.trained, adapters=adapters
        )
    if part.kind == "feed":
        return _mixed("feed", work.sequences, role="host")
    if part.kind == "embedding":
        return _embedding(model, work, phase, tp)
    if part.kind == "head":
        return _head(model, work.targets, phase, tp)
    return (Node(Operator("message", (message_bytes(model, work.tokens),)), "host"),)


def stage_graph(
    model: ModelSpec,
    layers: Layers,
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
        for part, repeats in stage_parts(model, layers, work.pefts, first=first, last=last, phase=phase)
        if repeats
    )
    return StageGraph(tuple((nodes, repeats) for nodes, repeats in parts if nodes), tp)


def message_bytes(model: ModelSpec, tokens: int) -> int:
    """Hidden states of a micro-batch, or their gradients."""
    return tokens * model.hidden * model.dtype_bytes


def _embedding(model: ModelSpec, work: MicrobatchWork, phase: Phase, tp: int) -> tuple[Node, ...]:
    """Embedding and what is attached to it, whose backward is all that there is of it."""
    nodes: tuple[Node, ...] = ()
    if phase == "fwd":
        embedding = Node(Operator("embedding", (work.tokens,)), "base")
        nodes = _with_sum(embedding, message_bytes(model, work.tokens), tp)
    for task, peft in enumerate(work.pefts):
        for each in embedding_attachments(peft, model):
            deps = (len(nodes) - 1,) if nodes else ()
            nodes += (Node(each.adapter.at(work.task_tokens[task]), "adapter", deps, task=task),)
    return nodes


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
