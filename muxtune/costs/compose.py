"""What a stage does for one micro-batch, as a list of operators; the planner and the profiler share it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from muxtune.costs.base import CostModel
from muxtune.model import ModelSpec
from muxtune.operators import Operator, Phase
from muxtune.workload import LoraSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class MicrobatchWork:
    """One micro-batch of an hTask, as the backbone sees it."""

    tokens: int
    """Of the stream, padding included."""
    task_tokens: tuple[int, ...]
    """Of each task's span."""
    loras: tuple[LoraSpec, ...]
    """Of each task."""
    attention: tuple[tuple[float, int, int], ...]
    """Batched attention calls as (how many, sequences, length); averages of micro-batches have fractions."""
    targets: float
    """Predicted tokens; may be an average too."""

    def __post_init__(self) -> None:
        assert len(self.task_tokens) == len(self.loras), (self.task_tokens, self.loras)


Weighted = tuple[Operator, float]
"""An operator, and how often it runs."""


@lru_cache(maxsize=256)
def frozen_products(model: ModelSpec) -> tuple[tuple[int, int], ...]:
    """(in_features, out_features) of the frozen product of each block of a layer.

    A layer is four blocks: norm and attention's inputs; attention and its output; norm and the MLP's inputs;
    activation and the MLP's output. Linears that read the same input (queries, keys and values; gate and up)
    run as one.
    """
    products: dict[int, tuple[int, int]] = {}
    for linear in model.linears:
        _, out_features = products.get(linear.block, (0, 0))
        products[linear.block] = (linear.in_features, out_features + linear.out_features)
    return tuple(products[block] for block in sorted(products))


def layer_operators(
    model: ModelSpec, work: MicrobatchWork, phase: Phase, *, input_gradient: bool = True
) -> list[Weighted]:
    """Operators of one layer for one micro-batch.

    Args:
        model: The backbone.
        work: The micro-batch.
        phase: Forward or backward.
        input_gradient: False for the backward of the first layer of all: nothing before it is trained, so
            the gradient stops at the first block that has an adapter, before that block's frozen operators.
    """
    first_block = 0
    if phase == "bwd" and not input_gradient:
        first_block = 1 + min(_adapted_block(model, lora.targets) for lora in work.loras)
    weighted: list[Weighted] = []
    for block in range(first_block, 4):
        weighted += _BEFORE_LINEARS[block](work)
        weighted.append((Operator("linear", (*frozen_products(model)[block], work.tokens)), 1.0))
    adapters = Counter(
        Operator("lora", (i, o, lora.r, tokens))
        for lora, tokens in zip(work.loras, work.task_tokens, strict=True)
        for i, o in _targeted_shapes(model, lora.targets)
    )
    return weighted + list(adapters.items())


def stage_operators(
    model: ModelSpec, layers: int, *, first: bool, last: bool, work: MicrobatchWork, phase: Phase
) -> list[Weighted]:
    """Operators of one action of a stage with ``layers`` layers."""
    weighted: list[Weighted] = []
    inner = layers
    if phase == "fwd":
        weighted += _between("feed", (), sum(calls * sequences for calls, sequences, _ in work.attention))
    if first:
        weighted += layer_operators(model, work, phase, input_gradient=False)
        inner -= 1
        if phase == "fwd":
            weighted.append((Operator("embedding", (work.tokens,)), 1.0))
    if inner:
        weighted += [(op, count * inner) for op, count in layer_operators(model, work, phase)]
    if last:
        weighted += _between("head", (), work.targets)
    return weighted


def stage_seconds(
    costs: CostModel,
    model: ModelSpec,
    layers: int,
    *,
    first: bool,
    last: bool,
    work: MicrobatchWork,
    phase: Phase,
) -> float:
    """Seconds of one action of a stage: its operators, and the messages from and to its neighbours.

    Args:
        costs: Of the device.
        model: The backbone.
        layers: That the stage holds, at least one.
        first: Whether the stage begins with the embedding.
        last: Whether it ends with the head.
        work: The micro-batch.
        phase: ``fwd`` for an F, ``bwd`` for a B.
    """
    weighted = stage_operators(model, layers, first=first, last=last, work=work, phase=phase)
    operators_s = sum(costs.latency_s(op, phase) * count for op, count in weighted)
    seconds = costs.action_s(operators_s, phase)
    neighbours = (not first) + (not last)  # an action receives from one and sends to the other
    if neighbours:
        message = Operator("message", (message_bytes(model, work.tokens),))
        seconds += neighbours * costs.latency_s(message, "fwd")
    return seconds


def step_seconds(costs: CostModel, model: ModelSpec, layers: int, lora: LoraSpec) -> float:
    """Seconds of one task's optimizer step on a stage with ``layers`` layers."""
    shapes = _targeted_shapes(model, lora.targets)
    parameters = layers * lora.r * sum(i + o for i, o in shapes)
    return costs.latency_s(Operator("optimizer", (2 * layers * len(shapes), parameters)), "fwd")


def message_bytes(model: ModelSpec, tokens: int) -> int:
    """Hidden states of a micro-batch, or their gradients."""
    return tokens * model.hidden * model.dtype_bytes


def p2p_seconds(costs: CostModel, model: ModelSpec, tokens: int) -> float:
    """Seconds until a micro-batch's hidden states, or their gradients, have reached the neighbour."""
    return costs.latency_s(Operator("p2p", (message_bytes(model, tokens),)), "fwd")


def _norm(work: MicrobatchWork) -> Iterator[Weighted]:
    yield Operator("norm", (work.tokens,)), 1.0


def _attention(work: MicrobatchWork) -> Iterator[Weighted]:
    for calls, sequences, length in work.attention:
        yield Operator("attention", (sequences, length)), calls


def _activation(work: MicrobatchWork) -> Iterator[Weighted]:
    yield Operator("activation", (work.tokens,)), 1.0


_BEFORE_LINEARS = (_norm, _attention, _norm, _activation)
"""What a block does before its linears."""


def _between(kind: str, other_dims: tuple[int, ...], amount: float) -> list[Weighted]:
    """An operator whose first dimension is an average: a mixture of the two whole sizes around it."""
    below = math.floor(amount)
    above = amount - below
    mixture = ((below, 1.0 - above), (below + 1, above))
    return [(Operator(kind, (size, *other_dims)), share) for size, share in mixture if size and share]


@lru_cache(maxsize=4096)
def _targeted_shapes(model: ModelSpec, targets: tuple[str, ...]) -> list[tuple[int, int]]:
    """(in_features, out_features) of every linear of a layer that gets an adapter."""
    return [
        (linear.in_features, linear.out_features) for linear in model.targeted_linears(targets, "targets")
    ]


@lru_cache(maxsize=4096)
def _adapted_block(model: ModelSpec, targets: tuple[str, ...]) -> int:
    """First block of a layer that gets an adapter."""
    return min(linear.block for linear in model.targeted_linears(targets, "targets"))
