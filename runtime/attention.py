"""Causal attention inside each sequence of a flat token stream.

Sequences of near-equal length are gathered into rows and attended to in one batched call; what belongs to no
sequence comes out as zero. A row that goes on with a sequence from earlier micro-batches reads the keys and
values that these have left (:mod:`runtime.carry`). :func:`attention_reference` is the plain definition that
the tests compare with.
"""

# T tokens of the stream, H heads, K key/value heads, D head width, F = (H + 2 K) D features of q|k|v
# N sequences of a group, L its longest row, S its most keys

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  # torch's own abbreviation
from numpy.typing import NDArray
from torch import Tensor

from muxtune.alignment import (
    MicrobatchLayout,
    Row,
    Segment,
    group_by_length,
    group_carried_rows,
    row_slots,
    sequence_rows,
)
from runtime.autograd import Context
from runtime.carry import CarriedKv, CarriedPlaces, leaving_rows


@dataclass(slots=True)
class Prefix:
    """Keys and values from earlier micro-batches, for the rows of one attention call."""

    positions: Tensor
    """``[N, L]``, position of each slot in its sequence."""
    source: Tensor
    """``[N S]``, where the keys lie: in what was left, or behind that in the group's own slots."""
    visible: Tensor
    """``[N, 1, L, S]``, which query sees which key."""
    _bias: Tensor | None = None

    def bias(self, dtype: torch.dtype) -> Tensor:
        """0 where a query sees a key, and minus infinity elsewhere.

        The same tensor for all layers: of a boolean mask, each would keep a converted copy of its own.
        """
        if self._bias is None:
            hidden = torch.zeros(self.visible.shape, dtype=dtype, device=self.visible.device)
            self._bias = hidden.masked_fill_(~self.visible, float("-inf"))
        return self._bias


@dataclass(frozen=True, slots=True)
class RowGroup:
    """Sequences that share one attention call."""

    rows: int
    length: int
    """Of every row; shorter sequences repeat their last token, which nobody attends to."""
    start: int
    """First token, if the rows lie one after the other in the stream (``index`` is None then)."""
    index: Tensor | None
    """``[N L]``, token in each slot of the rows."""
    padding: Tensor | None
    """Slots behind the end of their sequence; None if there are none."""
    prefix: Prefix | None = None
    """Of rows that go on with a sequence; None for those that begin one."""

    def rotation(self, table: Tensor) -> Tensor:
        """Rows of a table of :class:`RopeTables` for the slots."""
        return table[: self.length] if self.prefix is None else table[self.prefix.positions]

    def take(self, x_TF: Tensor) -> Tensor:
        """The group's tokens, ``[N L, F]``; a view where they lie together."""
        if self.index is None:
            return x_TF[self.start : self.start + self.rows * self.length]
        # index_select, not indexing: 10 against 47 us for [512, 256] on one core.
        return x_TF.index_select(0, self.index)


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """Where the sequences of a micro-batch go and how they come back."""

    groups: tuple[RowGroup, ...]
    restore: Tensor | None
    """``[T]``, slot of each token in the concatenated rows; None if the rows are the stream."""
    holes: bool
    """Whether tokens without a sequence exist; their slot is one behind the last."""
    carried: CarriedKv | None = None
    """Of the carry group; None where every sequence lies in one micro-batch."""
    leaves: Tensor | None = None
    """``[M]``, slots whose keys and values later micro-batches need; None if there are none."""

    def put_back(self, parts: list[Tensor], like: Tensor) -> Tensor:
        """Rows of all groups, each ``[N L, F]``, to stream order; tokens without a sequence get 0.

        A gather with the inverse index: ``index_add`` needs twice its time on CPU.
        """
        if self.restore is None:
            return parts[0]
        if self.holes:
            parts = [*parts, like.new_zeros(1, like.shape[1])]
        rows = parts[0] if len(parts) == 1 else torch.cat(parts)
        return rows.index_select(0, self.restore)


def build_attention_plan(
    segments: Sequence[Segment],
    tokens: int,
    device: str = "cpu",
    *,
    carried: CarriedKv | None = None,
    earlier: Sequence[MicrobatchLayout] = (),
) -> AttentionPlan:
    """Group the sequences of one micro-batch.

    Args:
        segments: Sequences with their rows, which do not overlap.
        tokens: T.
        device: Of the index tensors.
        carried: Of its carry group, if sequences may spread over several micro-batches.
        earlier: Layouts of the carry group's micro-batches before this one.
    """
    rows = sequence_rows(segments)
    places = CarriedPlaces(earlier)
    groups: list[RowGroup] = []
    restore = np.full(tokens, -1, dtype=np.int64)
    slots = 0
    for members in _row_groups(rows):
        lengths = np.array([row.tokens for row in members])
        n, length = len(members), row_slots(int(lengths.max()))
        column = np.arange(length)
        index = _row_index(members, np.minimum(column, lengths[:, None] - 1))
        real = column < lengths[:, None]
        restore[index[real]] = slots + np.flatnonzero(real)
        slots += n * length
        together = bool(real.all()) and bool((np.diff(index.ravel()) == 1).all())
        groups.append(
            RowGroup(
                rows=n,
                length=length,
                start=int(index[0, 0]),
                index=None if together else torch.from_numpy(index.ravel()).to(device),
                padding=None if real.all() else torch.from_numpy(np.flatnonzero(~real.ravel())).to(device),
                prefix=_build_prefix(members, length, places, device) if members[0].carried else None,
            )
        )
    in_place = len(groups) == 1 and groups[0].index is None and slots == tokens
    leaving = [_row_tokens(row) for row in leaving_rows(rows)]
    leaves = torch.from_numpy(restore[np.concatenate(leaving)]).to(device) if leaving else None
    empty = restore < 0
    restore[empty] = slots
    return AttentionPlan(
        groups=tuple(groups),
        restore=None if in_place else torch.from_numpy(restore).to(device),
        holes=bool(empty.any()),
        carried=carried,
        leaves=leaves,
    )


def _row_groups(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Rows that share an attention call."""
    begin, go_on = [row for row in rows if not row.carried], [row for row in rows if row.carried]
    for group in group_by_length([row.tokens for row in begin]):
        yield [begin[i] for i in group]
    for group in group_carried_rows(go_on):
        yield [go_on[i] for i in group]


def _row_tokens(row: Row) -> NDArray[np.int64]:
    """Tokens of the stream that belong to a row, in the order of the sequence."""
    return np.concatenate([np.arange(part.start, part.start + part.row_tokens) for part in row.parts])


def _row_index(rows: Sequence[Row], places: NDArray[np.int64]) -> NDArray[np.int64]:
    """Tokens of the stream at ``[N, L]`` places in rows."""
    index = np.array([row.parts[0].start for row in rows])[:, None] + places
    for i, row in enumerate(rows):
        if len(row.parts) > 1:
            index[i] = _row_tokens(row)[places[i]]
    return index


def _build_prefix(rows: Sequence[Row], length: int, places: CarriedPlaces, device: str) -> Prefix:
    keys = np.array([row.carried + row.tokens for row in rows])
    slots = row_slots(int(keys.max()))
    source = np.empty((len(rows), slots), dtype=np.int64)
    for i, row in enumerate(rows):
        own = places.tokens + i * length
        source[i, : row.carried] = places.of(row)
        source[i, row.carried : keys[i]] = np.arange(own, own + row.tokens)
        source[i, keys[i] :] = own + row.tokens - 1  # after all its queries, so none of them sees it
    positions = np.array([[row.carried] for row in rows]) + np.minimum(
        np.arange(length), np.array([[row.tokens - 1] for row in rows])
    )
    visible = np.arange(slots) <= positions[:, :, None]
    return Prefix(
        positions=torch.from_numpy(positions).to(device),
        source=torch.from_numpy(source.ravel()).to(device),
        visible=torch.from_numpy(visible[:, None]).to(device),
    )


@dataclass(frozen=True, slots=True)
class RopeTables:
    """Rotary position embedding: ``x cos + swap(x) sin``, ``swap`` exchanging the halves of a head."""

    cos: Tensor
    """``[positions, 1, D]``."""
    sin: Tensor
    """``[positions, 1, D]``, negative in the first half."""
    inverse_sin: Tensor
    """The same of the transposed rotation, which the backward needs."""

    @staticmethod
    def build(cos: Tensor, sin: Tensor) -> RopeTables:
        """From the tables ``[positions, D]`` of ``x cos + rotate_half(x) sin``."""
        low, high = sin[:, None].chunk(2, dim=-1)
        return RopeTables(cos[:, None], torch.cat((-low, high), -1), torch.cat((high, -low), -1))


def rotate_(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate ``[N, L, heads, D]`` in place."""
    half = x.shape[-1] // 2
    swapped = torch.cat((x[..., half:], x[..., :half]), -1)
    x.mul_(cos).addcmul_(swapped, sin)


class _ToRows(torch.autograd.Function):
    """Stream of q|k|v to rotated rows of every group; the backward is a gather too."""

    @staticmethod
    def forward(
        ctx: Context, qkv_TF: Tensor, plan: AttentionPlan, heads: int, kv_heads: int, rope: RopeTables | None
    ) -> tuple[Tensor, ...]:
        ctx.plan, ctx.rope, ctx.rotated = plan, rope, heads + kv_heads
        outputs: list[Tensor] = []
        for group in plan.groups:
            rows = group.take(qkv_TF)
            if group.index is None and (rope is not None or plan.restore is not None):
                # A view of the input: the rotation must not change it, and saving it would save all of it.
                rows = rows.clone()
            rows = rows.view(group.rows, group.length, heads + 2 * kv_heads, -1)
            if rope is not None:
                rotate_(rows[:, :, : ctx.rotated], group.rotation(rope.cos), group.rotation(rope.sin))
            outputs += rows.transpose(1, 2).split((heads, kv_heads, kv_heads), dim=1)
        ctx.like = qkv_TF.new_empty(0, qkv_TF.shape[1])
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        parts: list[Tensor] = []
        for i, group in enumerate(ctx.plan.groups):
            # Attention gives its gradients as [N, L, heads, D] behind a transpose: this copies once.
            rows = torch.cat([grad.transpose(1, 2) for grad in grads[3 * i : 3 * i + 3]], dim=2)
            if ctx.rope is not None:
                cos, sin = group.rotation(ctx.rope.cos), group.rotation(ctx.rope.inverse_sin)
                rotate_(rows[:, :, : ctx.rotated], cos, sin)
            parts.append(rows.view(group.rows * group.length, -1))
        return ctx.plan.put_back(parts, ctx.like), None, None, None, None


class _FromRows(torch.autograd.Function):
    """Rows of every group, ``[N, H, L, D]``, back to the stream."""

    @staticmethod
    def forward(ctx: Context, plan: AttentionPlan, like: Tensor, *rows: Tensor) -> Tensor:
        ctx.plan, ctx.heads = plan, rows[0].shape[1]
        flat = [each.transpose(1, 2).flatten(2).flatten(0, 1) for each in rows]
        return plan.put_back(flat, like)

    @staticmethod
    def backward(ctx: Context, grad_TF: Tensor) -> tuple[Tensor | None, ...]:
        grads: list[Tensor] = []
        for group in ctx.plan.groups:
            rows = group.take(grad_TF)
            if group.padding is not None:
                rows.index_fill_(0, group.padding, 0.0)
            grads.append(rows.view(group.rows, group.length, ctx.heads, -1).transpose(1, 2))
        return None, None, *grads


def causal_attention(
    qkv_TF: Tensor,
    plan: AttentionPlan,
    heads: int,
    kv_heads: int,
    rope: RopeTables | None,
    layer: object = None,
) -> Tensor:
    """Attention of every token to itself and the tokens before it in its own sequence.

    Args:
        qkv_TF: Queries, keys and values side by side, ``[T, (H + 2 K) D]``.
        plan: Of this micro-batch.
        heads: H.
        kv_heads: K; a divisor of H.
        rope: Rotates queries and keys by their position in the sequence; None for learned positions.
        layer: Under whose name keys and values go from micro-batch to micro-batch.

    Returns:
        ``[T, H D]``; zero where no sequence is.
    """
    width = qkv_TF.shape[1] // (heads + 2 * kv_heads) * heads
    if not plan.groups:
        return qkv_TF.new_zeros(len(qkv_TF), width)
    rows = _ToRows.apply(qkv_TF, plan, heads, kv_heads, rope)
    left = plan.carried.left(layer) if plan.carried is not None else ()
    # enable_gqa, not repeated keys: 1.0 against 1.4 ms forward and backward at 16 x 32 tokens, 8/4 heads.
    grouped = heads != kv_heads
    attended: list[Tensor] = []
    for i, group in enumerate(plan.groups):
        q, k, v = rows[3 * i : 3 * i + 3]
        if group.prefix is None:
            attended.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped))
            continue
        k, v = _with_prefix(k, v, group.prefix, left)
        bias = group.prefix.bias(q.dtype)
        attended.append(F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=grouped))
    result: Tensor = _FromRows.apply(plan, qkv_TF.new_empty(0, width), *attended)
    if plan.leaves is None or plan.carried is None:
        return result
    kv = torch.cat([_side_by_side(rows[i + 1], rows[i + 2]) for i in range(0, len(rows), 3)])
    return plan.carried.leave(layer, kv.index_select(0, plan.leaves), result)


def _side_by_side(k: Tensor, v: Tensor) -> Tensor:
    """Keys and values of a group, ``[N, K, L, D]``, slot by slot: ``[N L, 2 K D]``."""
    return torch.cat((k, v), dim=1).transpose(1, 2).flatten(2).flatten(0, 1)


def _with_prefix(k: Tensor, v: Tensor, prefix: Prefix, left: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Keys and values from the start of the sequences, each ``[N, K, S, D]``."""
    n, kv_heads = k.shape[:2]
    whole = torch.cat([*left, _side_by_side(k, v)]).index_select(0, prefix.source)
    keys, values = whole.view(n, -1, 2 * kv_heads, k.shape[3]).transpose(1, 2).split(kv_heads, dim=1)
    return keys, values


def attention_reference(
    qkv_TF: Tensor, segments: Sequence[Segment], heads: int, kv_heads: int, rope: RopeTables | None
) -> Tensor:
    """Definition of :func:`causal_attention`: sequence by sequence, explicit softmax, plain autograd.

    Sequences lie in this micro-batch from start to end, if in several parts.
    """
    width = qkv_TF.shape[1] // (heads + 2 * kv_heads)
    out = qkv_TF.new_zeros(len(qkv_TF), heads * width)
    for row in sequence_rows(segments):
        tokens = torch.from_numpy(_row_tokens(row)).to(qkv_TF.device)
        x = qkv_TF[tokens].view(len(tokens), heads + 2 * kv_heads, width)
        q, k, v = x.split((heads, kv_heads, kv_heads), dim=1)
        if rope is not None:
            cos, sin = rope.cos[: len(tokens)], rope.sin[: len(tokens)]
            q, k = (y * cos + y.roll(width // 2, dims=-1) * sin for y in (q, k))
        k, v = (y.repeat_interleave(heads // kv_heads, dim=1) for y in (k, v))
        scores = torch.einsum("ihd,jhd->hij", q, k) * width**-0.5
        later = torch.ones_like(scores[0], dtype=torch.bool).triu(1)
        weights = scores.masked_fill(later, float("-inf")).softmax(-1)
        out = out.index_put((tokens,), torch.einsum("hij,jhd->ihd", weights, v).flatten(1))
    return out
