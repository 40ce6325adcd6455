"""Attention of one micro-batch by the backend of one's choice."""

# T tokens of the stream, H heads, K key/value heads, D head width, F = (H + 2 K) D features of q|k|v

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from muxtune.batches import MicrobatchLayout, Row, Segment, Span, sequence_rows
from muxtune.graph.attention_backends import DEFAULT_ATTENTION, AttentionName
from runtime.attention.backend import Placement
from runtime.attention.backends import BACKENDS
from runtime.attention.carried_kv import CarriedKv, CarriedPlaces
from runtime.attention.in_front import attend_in_front
from runtime.attention.rope import RopeTables


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """Where the sequences of a micro-batch go."""

    placement: Placement | None
    """None if there are none."""
    carried: CarriedKv | None = None
    """Keys and values of the carry group; None where every sequence lies in one micro-batch."""
    rows: tuple[Row, ...] = ()
    """Its sequences."""


def build_attention_plan(
    segments: Sequence[Segment],
    tokens: int,
    device: str = "cpu",
    *,
    backend: AttentionName = DEFAULT_ATTENTION,
    carried: CarriedKv | None = None,
    earlier: Sequence[MicrobatchLayout] = (),
) -> AttentionPlan:
    """Lay out the sequences of one micro-batch.

    Args:
        segments: Sequences with their rows, which do not overlap.
        tokens: T, the tokens of the stream.
        device: Device of the index tensors.
        backend: What computes attention; :func:`~runtime.attention.backends.check_attention` says whether it
            can.
        carried: Keys and values of the carry group, if sequences may spread over several micro-batches.
        earlier: Layouts of the carry group's micro-batches before this one.
    """
    rows = sequence_rows(segments)
    if not rows:
        return AttentionPlan(None, carried)
    return AttentionPlan(
        BACKENDS[backend].place(rows, tokens, CarriedPlaces(earlier), device), carried, tuple(rows)
    )


def causal_attention(
    qkv_TF: Tensor,
    plan: AttentionPlan,
    heads: int,
    kv_heads: int,
    rope: RopeTables | None,
    layer: object = None,
    *,
    in_front: Sequence[tuple[Span, Tensor]] = (),
) -> Tensor:
    """Attention of every token to itself and the tokens before it in its own sequence.

    Args:
        qkv_TF: Queries, keys and values side by side, ``[T, (H + 2 K) D]``.
        plan: Plan of this micro-batch.
        heads: H, the heads of queries.
        kv_heads: K, the heads of keys and values; a divisor of H.
        rope: Rotates queries and keys by their position in the sequence; None for learned positions.
        layer: Key under which keys and values of a layer go from micro-batch to micro-batch.
        in_front: Tokens of a task, and trained keys and values that all of them attend to, ``[P, 2 K D]``.

    Returns:
        ``[T, H D]``; zero where no sequence is.
    """
    if plan.placement is None:
        return qkv_TF.new_zeros(len(qkv_TF), qkv_TF.shape[1] // (heads + 2 * kv_heads) * heads)
    left = plan.carried.left(layer) if plan.carried is not None else ()
    result, leaving = plan.placement.attend(qkv_TF, heads, kv_heads, rope, left)
    if in_front:
        result = attend_in_front(result, qkv_TF, plan.rows, in_front, heads, kv_heads, rope)
    if leaving is None or plan.carried is None:
        return result
    return plan.carried.leave(layer, leaving, result)
