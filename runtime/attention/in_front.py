"""Attention of tasks that have trained keys and values in front of their sequences, sequence by sequence.

The backends see the stream alone, so what they gave for the rows of these tasks is replaced. As in peft, the
keys in front are not rotated, and every token attends to them; positions of the sequence begin behind them.
"""

# T tokens of the stream, t slots of a row, P keys in front, H heads, K key/value heads, D head width

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own abbreviation
from torch import Tensor

from muxtune.batches import Row, Span
from muxtune.support.errors import RunError
from runtime.attention.rope import RopeTables, rotated


def attend_in_front(
    attended_TF: Tensor,
    qkv_TF: Tensor,
    rows: Sequence[Row],
    in_front: Sequence[tuple[Span, Tensor]],
    heads: int,
    kv_heads: int,
    rope: RopeTables | None,
) -> Tensor:
    """Attention of all rows, ``[T, H D]``.

    Args:
        attended_TF: What a backend gave, without the keys in front.
        qkv_TF: Queries, keys and values side by side.
        rows: Rows of the micro-batch.
        in_front: Tokens of a task, and its keys and values ``[P, 2 K D]``.
        heads: H, the heads of queries.
        kv_heads: K, the heads of keys and values.
        rope: Rotates queries and keys; None for learned positions.

    Raises:
        RunError: A row goes on from or in another micro-batch.
    """
    for span, kv_PF in in_front:
        for row in rows:
            if not span.start <= row.parts[0].start < span.stop:
                continue
            if row.carried or row.after:
                raise RunError("keys in front of sequences that spread over micro-batches are not there yet")
            starts = [(part.start, part.offset, part.row_tokens) for part in row.parts]
            places_t = torch.cat([torch.arange(s, s + n, device=qkv_TF.device) for s, _, n in starts])
            positions_t = torch.cat([torch.arange(o, o + n, device=qkv_TF.device) for _, o, n in starts])
            own_tF = _attend(qkv_TF[places_t], positions_t, kv_PF.to(qkv_TF.dtype), heads, kv_heads, rope)
            attended_TF = attended_TF.index_copy(0, places_t, own_tF)
    return attended_TF


def _attend(
    qkv_tF: Tensor,
    positions_t: Tensor,
    kv_PF: Tensor,
    heads: int,
    kv_heads: int,
    rope: RopeTables | None,
) -> Tensor:
    t, front = len(qkv_tF), len(kv_PF)
    q, k, v = qkv_tF.view(t, heads + 2 * kv_heads, -1).split([heads, kv_heads, kv_heads], dim=1)
    if rope is not None:
        cos, sin = (table[positions_t + front] for table in (rope.cos, rope.sin))
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
    k_front, v_front = kv_PF.view(front, 2 * kv_heads, -1).split(kv_heads, dim=1)
    k, v = torch.cat([k_front, k]), torch.cat([v_front, v])
    visible = torch.ones(t, front + t, dtype=torch.bool, device=q.device).tril(front)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=heads != kv_heads)
    return attended[0].transpose(0, 1).reshape(t, -1)
