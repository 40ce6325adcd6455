"""Sequences gathered from the stream into rows, attention on the rows, and the way back."""

# T tokens of the stream, H heads, K key/value heads, D head width, F = (H + 2 K) D features of q|k|v
# N sequences of a group, L its longest row, S its most keys

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from muxtune.batches import Row
from runtime.attention.backend import Placement, row_tokens, side_by_side
from runtime.attention.carried_kv import CarriedPlaces, leaving_rows
from runtime.attention.rope import RopeTables, rotate_
from runtime.ops.autograd import Context
from runtime.ops.to_device import on_device


@dataclass(slots=True)
class Bias:
    """Visibility of a row's keys to its queries, as a term of the scores."""

    visible: Tensor
    """``[N, 1, L, S]``."""
    _bias: Tensor | None = None

    def of(self, dtype: torch.dtype) -> Tensor:
        """0 where a query sees a key, and minus infinity elsewhere.

        The same tensor for all layers: of a boolean mask, each would keep a converted copy of its own.
        """
        if self._bias is None:
            hidden = torch.zeros(self.visible.shape, dtype=dtype, device=self.visible.device)
            self._bias = hidden.masked_fill_(~self.visible, float("-inf"))
        return self._bias


@dataclass(frozen=True, slots=True)
class Ends:
    """Where sequences end that follow each other in one row, and their keys."""

    queries: Tensor
    """``[N + 1]``, int32: 0, then the end of each sequence among the queries."""
    keys: Tensor
    """``[N + 1]``, int32, among the keys."""
    longest_queries: int
    """Queries of the longest sequence."""
    longest_keys: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RowGroup:
    """Rows of one length: what one attention call works on."""

    rows: int
    length: int
    """Tokens of every row; shorter sequences repeat their last token, which nobody attends to."""
    start: int
    """First token, if the rows lie one after the other in the stream (``index`` is None then)."""
    index: Tensor | None
    """``[N L]``, token in each slot of the rows."""
    padding: Tensor | None = None
    """Slots behind the end of their sequence; None if there are none."""
    positions: Tensor | None = None
    """``[N, L]``, position of each slot in its sequence; None where every row begins one."""
    source: Tensor | None = None
    """``[N S]``, where the keys lie: in what earlier micro-batches have left, or behind that in the group's
    own slots; None where they are the own ones."""
    bias: Bias | None = None
    """Bias in rows that go on with sequences from earlier micro-batches."""
    ends: Ends | None = None
    """Ends of the sequences in a row that has several."""

    def rotation(self, table: Tensor) -> Tensor:
        """Rows of a table of :class:`RopeTables` for the slots."""
        return table[: self.length] if self.positions is None else table[self.positions]

    def take(self, x_TF: Tensor) -> Tensor:
        """The group's tokens, ``[N L, F]``; a view where they lie together."""
        if self.index is None:
            return x_TF[self.start : self.start + self.rows * self.length]
        # index_select, not indexing: 10 against 47 us for [512, 256] on one core.
        return x_TF.index_select(0, self.index)


@dataclass(frozen=True, slots=True)
class RowLayout:
    """Where the tokens of a micro-batch go and how they come back."""

    groups: tuple[RowGroup, ...]
    restore: Tensor | None
    """``[T]``, slot of each token in the concatenated rows; None if the rows are the stream."""
    holes: bool
    """Whether tokens without a sequence exist; their slot is one behind the last."""
    leaves: Tensor | None
    """``[M]``, slots whose keys and values later micro-batches need; None if there are none."""

    def put_back(self, parts: list[Tensor], like: Tensor) -> Tensor:
        """Rows of all groups, each ``[N L, F]``, to stream order; tokens without a sequence get 0.

        A gather with the inverse index: ``index_add`` needs twice its time on CPU.
        """
        if self.restore is None:
            return parts[0] if len(parts) == 1 else torch.cat(parts)
        if self.holes:
            parts = [*parts, like.new_zeros(1, like.shape[1])]
        rows = parts[0] if len(parts) == 1 else torch.cat(parts)
        return rows.index_select(0, self.restore)


class Kernel(Protocol):
    """Causal attention of one group; queries ``[N, H, L, D]``, keys and values ``[N, K, S, D]``."""

    def __call__(self, group: RowGroup, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attended values, of the shape of the queries."""
        ...


@dataclass(frozen=True, slots=True)
class RowPlacement(Placement):
    """A layout, and what computes attention on its groups."""

    layout: RowLayout
    kernel: Kernel

    def attend(
        self, qkv_TF: Tensor, heads: int, kv_heads: int, rope: RopeTables | None, left: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """See :class:`Placement`."""
        layout = self.layout
        rows = _ToRows.apply(qkv_TF, layout, heads, kv_heads, rope)
        attended: list[Tensor] = []
        for i, group in enumerate(layout.groups):
            q, k, v = rows[3 * i : 3 * i + 3]
            if group.source is not None:
                k, v = _gathered(k, v, group.source, left)
            attended.append(self.kernel(group, q, k, v))
        width = qkv_TF.shape[1] // (heads + 2 * kv_heads) * heads
        result: Tensor = _FromRows.apply(layout, qkv_TF.new_empty(0, width), *attended)
        if layout.leaves is None:
            return result, None
        kv = torch.cat([side_by_side(rows[i + 1], rows[i + 2]) for i in range(0, len(rows), 3)])
        return result, kv.index_select(0, layout.leaves)


def _gathered(k: Tensor, v: Tensor, source: Tensor, left: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Keys and values from the start of the sequences, each ``[N, K, S, D]``."""
    n, kv_heads = k.shape[:2]
    whole = torch.cat([*left, side_by_side(k, v)]).index_select(0, source)
    keys, values = whole.view(n, -1, 2 * kv_heads, k.shape[3]).transpose(1, 2).split(kv_heads, dim=1)
    return keys, values


class _ToRows(torch.autograd.Function):
    """Stream of q|k|v to rotated rows of every group; the backward is a gather too."""

    @staticmethod
    def forward(
        ctx: Context, qkv_TF: Tensor, layout: RowLayout, heads: int, kv_heads: int, rope: RopeTables | None
    ) -> tuple[Tensor, ...]:
        ctx.layout, ctx.rope, ctx.rotated = layout, rope, heads + kv_heads
        outputs: list[Tensor] = []
        for group in layout.groups:
            rows = group.take(qkv_TF)
            if group.index is None and (rope is not None or len(rows) < len(qkv_TF)):
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
        for i, group in enumerate(ctx.layout.groups):
            # Attention gives its gradients as [N, L, heads, D] behind a transpose: this copies once.
            rows = torch.cat([grad.transpose(1, 2) for grad in grads[3 * i : 3 * i + 3]], dim=2)
            if ctx.rope is not None:
                cos, sin = group.rotation(ctx.rope.cos), group.rotation(ctx.rope.inverse_sin)
                rotate_(rows[:, :, : ctx.rotated], cos, sin)
            parts.append(rows.view(group.rows * group.length, -1))
        return ctx.layout.put_back(parts, ctx.like), None, None, None, None


class _FromRows(torch.autograd.Function):
    """Rows of every group, ``[N, H, L, D]``, back to the stream."""

    @staticmethod
    def forward(ctx: Context, layout: RowLayout, like: Tensor, *rows: Tensor) -> Tensor:
        ctx.layout, ctx.heads = layout, rows[0].shape[1]
        flat = [each.transpose(1, 2).flatten(2).flatten(0, 1) for each in rows]
        return layout.put_back(flat, like)

    @staticmethod
    def backward(ctx: Context, grad_TF: Tensor) -> tuple[Tensor | None, ...]:
        grads: list[Tensor] = []
        for group in ctx.layout.groups:
            rows = group.take(grad_TF)
            if group.padding is not None:
                rows.index_fill_(0, group.padding, 0.0)
            grads.append(rows.view(group.rows, group.length, ctx.heads, -1).transpose(1, 2))
        return None, None, *grads


class Placed(NamedTuple):
    """A group with the tokens that it holds."""

    group: RowGroup
    tokens: NDArray[np.int64]
    """Positions in the stream, padding left out."""
    slots: NDArray[np.int64]
    """Where each of them lies in the group's ``N L`` slots."""


def build_layout(rows: Sequence[Row], groups: Iterable[Placed], tokens: int, device: str) -> RowLayout:
    """Find the way back from groups.

    Args:
        rows: Rows of the micro-batch.
        groups: All that they are gathered into.
        tokens: T, the tokens of the stream.
        device: Device of the index tensors.
    """
    restore = np.full(tokens, -1, dtype=np.int64)
    placed: list[RowGroup] = []
    slots = 0
    for each in groups:
        restore[each.tokens] = slots + each.slots
        slots += each.group.rows * each.group.length
        placed.append(each.group)
    in_place = slots == tokens and bool((restore == np.arange(tokens)).all())
    leaving = [row_tokens(row) for row in leaving_rows(rows)]
    leaves = on_device(restore[np.concatenate(leaving)], device) if leaving else None
    empty = restore < 0
    restore[empty] = slots
    return RowLayout(
        groups=tuple(placed),
        restore=None if in_place else on_device(restore, device),
        holes=bool(empty.any()),
        leaves=leaves,
    )


def carried_source(row: Row, places: CarriedPlaces, own_slot: int) -> NDArray[np.int64]:
    """Where the keys of a row lie: those that were left, then its own from slot ``own_slot`` on."""
    own = places.tokens + own_slot
    earlier = places.of(row) if row.carried else np.zeros(0, dtype=np.int64)
    return np.concatenate([earlier, np.arange(own, own + row.tokens)])
