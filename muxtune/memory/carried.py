"""Bytes that micro-batches of a carry group leave to each other: keys, values and their gradients."""

from __future__ import annotations

from collections.abc import Sequence

from muxtune.costs.compose import MicrobatchWork
from muxtune.memory.weights import WHOLE, Sharding
from muxtune.model import ModelSpec


def carried_kv_bytes(model: ModelSpec, layers: int, *, tokens: float, sharding: Sharding = WHOLE) -> int:
    """Keys and values that a micro-batch leaves to later ones, from its forward to its backward.

    Args:
        model: Backbone.
        layers: Layers of the stage.
        tokens: Tokens whose keys and values are left; may be an average.
        sharding: Division of the stage among tensor-parallel ranks.
    """
    return round(2 * layers * tokens * sharding.kv_width(model) * model.dtype_bytes)


def carried_gradient_bytes(
    model: ModelSpec, layers: int, *, works: Sequence[MicrobatchWork], sharding: Sharding = WHOLE
) -> int:
    """Gradients of what a carry group has left, from its first backward to its last.

    The first backward brings them at once, for all that is left. The tensors share memory, so they stay until
    the group is back. If the micro-batch has one call that attends to carried keys, the gradients are views
    into that of all its keys, those of its own rows included; of several calls they are summed aside.

    Args:
        model: Backbone.
        layers: Layers of the stage.
        works: The group's micro-batches, in order.
        sharding: Division of the stage among tensor-parallel ranks.
    """
    tokens = sum(work.left_tokens for work in works)
    readers = [work.carried_attention for work in works if work.carried_attention]
    if tokens and readers:
        calls = readers[-1]
        if sum(n for n, *_ in calls) == 1:
            tokens += sum(sequences * queries for _, sequences, queries, _ in calls)
    return carried_kv_bytes(model, layers, tokens=tokens, sharding=sharding)
