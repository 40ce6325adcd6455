"""Causal attention inside each sequence of a flat token stream.

Sequences of near-equal length are gathered into rows and attended to in one batched call; what belongs to no
sequence comes out as zero. :func:`attention_reference` is the plain definition that the tests compare with.
"""

# T tokens of the stream, H heads, K key/value heads, D head width, F = (H + 2 K) D features of q|k|v
# N sequences of a group, L its longest row

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  # torch's own abbreviation
from torch import Tensor

from muxtune.alignment import Segment, group_by_length, row_slots
from runtime.autograd import Context


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


def build_attention_plan(segments: Sequence[Segment], tokens: int, device: str = "cpu") -> AttentionPlan:
    """Group the sequences of one micro-batch.

    Args:
        segments: Sequences with their rows, which do not overlap.
        tokens: T.
        device: Of the index tensors.
    """
    groups: list[RowGroup] = []
    restore = np.full(tokens, -1, dtype=np.int64)
    slots = 0
    for members in group_by_length([segment.row_tokens for segment in segments]):
        starts = np.array([segments[i].start for i in members])
        lengths = np.array([segments[i].row_tokens for i in members])
        n, length = len(members), row_slots(int(lengths[0]))
        column = np.arange(length)
        index = starts[:, None] + np.minimum(column, lengths[:, None] - 1)
        real = column < lengths[:, None]
        restore[index[real]] = slots + np.flatnonzero(real)
        slots += n * length
        together = bool(real.all()) and bool((np.diff(index.ravel()) == 1).all())
        groups.append(
            RowGroup(
                rows=n,
                length=length,
                start=int(starts[0]),
                index=None if together else torch.from_numpy(index.ravel()).to(device),
                padding=None if real.all() else torch.from_numpy(np.flatnonzero(~real.ravel())).to(device),
            )
        )
    in_place = len(groups) == 1 and groups[0].index is None and slots == tokens
    empty = restore < 0
    restore[empty] = slots
    return AttentionPlan(
        groups=tuple(groups),
        restore=None if in_place else torch.from_numpy(restore).to(device),
        holes=bool(empty.any()),
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
                rotate_(rows[:, :, : ctx.rotated], rope.cos[: group.length], rope.sin[: group.length])
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
                cos, sin = ctx.rope.cos[: group.length], ctx.rope.inverse_sin[: group.length]
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
    qkv_TF: Tensor, plan: AttentionPlan, heads: int, kv_heads: int, rope: RopeTables | None
) -> Tensor:
    """Attention of every token to itself and the tokens before it in its own sequence.

    Args:
        qkv_TF: Queries, keys and values side by side, ``[T, (H + 2 K) D]``.
        plan: Of this micro-batch.
        heads: H.
        kv_heads: K; a divisor of H.
        rope: Rotates queries and keys by their position in the sequence; None for learned positions.

    Returns:
        ``[T, H D]``; zero where no sequence is.
    """
    width = qkv_TF.shape[1] // (heads + 2 * kv_heads) * heads
    if not plan.groups:
        return qkv_TF.new_zeros(len(qkv_TF), width)
    rows = _ToRows.apply(qkv_TF, plan, heads, kv_heads, rope)
    # enable_gqa, not repeated keys: 1.0 against 1.4 ms forward and backward at 16 x 32 tokens, 8/4 heads.
    attended: list[Tensor] = []
    for i in range(0, len(rows), 3):
        q, k, v = rows[i : i + 3]
        grouped = heads != kv_heads
        attended.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped))
    result: Tensor = _FromRows.apply(plan, qkv_TF.new_empty(0, width), *attended)
    return result


def attention_reference(
    qkv_TF: Tensor, segments: Sequence[Segment], heads: int, kv_heads: int, rope: RopeTables | None
) -> Tensor:
    """Definition of :func:`causal_attention`: sequence by sequence, explicit softmax, plain autograd."""
    tokens, features = qkv_TF.shape
    width = features // (heads + 2 * kv_heads)
    pieces: list[Tensor] = []
    end = 0
    for segment in sorted(segments, key=lambda s: s.start):
        pieces.append(qkv_TF.new_zeros(segment.start - end, heads * width))
        end = segment.start + segment.row_tokens
        x = qkv_TF[segment.start : end].view(segment.row_tokens, heads + 2 * kv_heads, width)
        q, k, v = x.split((heads, kv_heads, kv_heads), dim=1)
        if rope is not None:
            cos, sin = rope.cos[: segment.row_tokens], rope.sin[: segment.row_tokens]
            q, k = (y * cos + y.roll(width // 2, dims=-1) * sin for y in (q, k))
        k, v = (y.repeat_interleave(heads // kv_heads, dim=1) for y in (k, v))
        scores = torch.einsum("ihd,jhd->hij", q, k) * width**-0.5
        later = torch.ones_like(scores[0], dtype=torch.bool).triu(1)
        weights = scores.masked_fill(later, float("-inf")).softmax(-1)
        pieces.append(torch.einsum("hij,jhd->ihd", weights, v).flatten(1))
    pieces.append(qkv_TF.new_zeros(tokens - end, heads * width))
    return torch.cat(pieces)
