"""Attention of one micro-batch by the backend of one's choice."""

# T tokens of the stream, H heads, K key/value heads, D head width, F = (H + 2 K) D features of q|k|v

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from muxtune.batches import MicrobatchLayout, Segment, sequence_rows
from muxtune.graph.attention_backends import DEFAULT_ATTENTION, AttentionName
from runtime.attention.backend import Placement
from runtime.attention.backends import BACKENDS
from runtime.attention.carried_kv import CarriedKv, CarriedPlaces
from runtime.attention.rope import RopeTables


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """Where the sequences of a micro-batch go."""

    placement: Placement | None
    """None if there are none."""
    carried: CarriedKv | None = None
    """Keys and values of the carry group; None where every sequence lies in one micro-batch."""
    in_front: int = 0
    """Keys and values that stand in front of sequences, of all tasks that have tokens here."""


def build_attention_plan(
    segments: Sequence[Segment],
    tokens: int,
    device: str = "cpu",
    *,
    backend: AttentionName = DEFAULT_ATTENTION,
    carried: CarriedKv | None = None,
    earlier: Sequence[MicrobatchLayout] = (),
    fronts: Sequence[int] = (),
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
        fronts: Per task of the hTask, keys and values in front of each sequence; by default there are none.
    """
    rows = sequence_rows(segments, fronts)
    if not rows:
        return AttentionPlan(None, carried)
    present = {row.parts[0].task: row.front for row in rows if row.front}
    places = CarriedPlaces(earlier, dict(sorted(present.items())))
    return AttentionPlan(BACKENDS[backend].place(rows, tokens, places, device), carried, places.in_front)


def causal_attention(
    qkv_TF: Tensor,
    plan: AttentionPlan,
    heads: int,
    kv_heads: int,
    rope: RopeTables | None,
    layer: object = None,
    *,
    in_front: Sequence[Tensor] = (),
) -> Tensor:
    """Attention of every token to itself and the tokens before it in its own sequence.

    Args:
        qkv_TF: Queries, keys and values side by side, ``[T, (H + 2 K) D]``.
        plan: Plan of this micro-batch.
        heads: H, the heads of queries.
        kv_heads: K, the heads of keys and values; a divisor of H.
        rope: Rotates queries and keys by their position in the sequence; None for learned positions.
        layer: Key under which keys and values of a layer go from micro-batch to micro-batch.
        in_front: Keys and values that all tokens of a task attend to, ``[P, 2 K D]``, without rotation: of
            each task that has tokens here, in their order.

    Returns:
        ``[T, H D]``; zero where no sequence is.
    """
    if plan.placement is None:
        return qkv_TF.new_zeros(len(qkv_TF), qkv_TF.shape[1] // (heads + 2 * kv_heads) * heads)
    left = plan.carried.left(layer) if plan.carried is not None else ()
    if in_front or plan.in_front:
        assert sum(map(len, in_front)) == plan.in_front, "as many keys in front of sequences as laid out"
        left = [*(kv_PF.to(qkv_TF.dtype) for kv_PF in in_front), *left]
    result, leaving = plan.placement.attend(qkv_TF, heads, kv_heads, rope, left)
    if leaving is None or plan.carried is None:
        return result
    return plan.carried.leave(layer, leaving, result)
