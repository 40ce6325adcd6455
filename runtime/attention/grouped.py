"""Rows of sequences, one batched call per group: many sequences of near-equal length, or one each."""

# N sequences of a group, L its longest row, S its most keys

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np
import torch.nn.functional as F  # noqa: N812  # torch's own abbreviation
from numpy.typing import NDArray
from torch import Tensor

from muxtune.batches import Row, group_by_length, group_carried_rows, row_slots
from runtime.attention.backend import AttentionBackend, AttentionSite, Placement, row_tokens
from runtime.attention.carried_kv import CarriedPlaces
from runtime.attention.rows import Bias, Placed, RowGroup, RowPlacement, build_layout, carried_source
from runtime.ops.to_device import on_device


class _RowAttention(AttentionBackend):
    """Rows without keys from elsewhere need no mask but the causal one, which kernels have built in."""

    isolates = True

    def refusal(self, site: AttentionSite) -> str | None:
        """Nothing: it trains on any device."""
        return None

    def place(self, rows: Sequence[Row], tokens: int, places: CarriedPlaces, device: str) -> Placement:
        """See :class:`AttentionBackend`."""
        groups = (self._build_group(members, places, device) for members in self._groups(rows))
        return RowPlacement(build_layout(rows, groups, tokens, device), attend_rows)

    @abstractmethod
    def _groups(self, rows: Sequence[Row]) -> Iterator[list[Row]]:
        """Rows that share a call: all or none of them have keys from elsewhere."""

    @abstractmethod
    def _slots(self, longest: int) -> int:
        """Slots of a row that has so many tokens."""

    def _build_group(self, members: Sequence[Row], places: CarriedPlaces, device: str) -> Placed:
        lengths = np.array([row.tokens for row in members])
        n, length = len(members), self._slots(int(lengths.max()))
        column = np.arange(length)
        index = _row_index(members, np.minimum(column, lengths[:, None] - 1))
        real = (column < lengths[:, None]).ravel()
        padded = not real.all()
        tokens = index.ravel()
        together = not padded and bool((np.diff(tokens) == 1).all())
        positions: Tensor | None = None
        source: Tensor | None = None
        bias: Bias | None = None
        if members[0].carried:
            positions, source, bias = self._carried(members, length, places, device)
        group = RowGroup(
            rows=n,
            length=length,
            start=int(index[0, 0]),
            index=None if together else on_device(tokens, device),
            padding=on_device(np.flatnonzero(~real), device) if padded else None,
            positions=positions,
            source=source,
            bias=bias,
        )
        slots = np.flatnonzero(real) if padded else np.arange(n * length)
        return Placed(group, tokens[slots] if padded else tokens, slots)

    def _carried(
        self, rows: Sequence[Row], length: int, places: CarriedPlaces, device: str
    ) -> tuple[Tensor, Tensor, Bias]:
        """Positions, sources of the keys, and who sees whom, of rows that have keys from elsewhere.

        What is behind the end of an example repeats its last position: with keys in front, a padded row may
        be longer than the backbone has positions.
        """
        keys = np.array([row.carried + row.tokens for row in rows])
        slots = self._slots(int(keys.max()))
        source = np.empty((len(rows), slots), dtype=np.int64)
        for i, row in enumerate(rows):
            source[i, : keys[i]] = carried_source(row, places, i * length)
            source[i, keys[i] :] = source[i, keys[i] - 1]  # after all its queries, so none of them sees it
        positions = np.array([[row.carried] for row in rows]) + np.minimum(
            np.arange(length), np.array([[row.length - 1] for row in rows])
        )
        visible = np.arange(slots) <= positions[:, :, None]
        return (
            on_device(positions, device),
            on_device(source.ravel(), device),
            Bias(on_device(visible[:, None], device)),
        )


class GroupedAttention(_RowAttention):
    """Sequences of near-equal length share a call, at the price of some padding."""

    name = "grouped"

    def _groups(self, rows: Sequence[Row]) -> Iterator[list[Row]]:
        begin, go_on = [row for row in rows if not row.carried], [row for row in rows if row.carried]
        for group in group_by_length([row.tokens for row in begin]):
            yield [begin[i] for i in group]
        for group in group_carried_rows(go_on):
            yield [go_on[i] for i in group]

    def _slots(self, longest: int) -> int:
        return row_slots(longest)


class LoopAttention(_RowAttention):
    """A call per sequence, without padding."""

    name = "loop"

    def _groups(self, rows: Sequence[Row]) -> Iterator[list[Row]]:
        # In the order of the stream: where nothing is between them, the results only have to be joined.
        return ([row] for row in sorted(rows, key=lambda row: row.parts[0].start))

    def _slots(self, longest: int) -> int:
        return longest


def attend_rows(group: RowGroup, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A :class:`~runtime.attention.rows.Kernel`: torch's."""
    # enable_gqa, not repeated keys: 1.0 against 1.4 ms forward and backward at 16 x 32 tokens, 8/4 heads.
    grouped = q.shape[1] != k.shape[1]
    if group.bias is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=group.bias.of(q.dtype), enable_gqa=grouped)


def _row_index(rows: Sequence[Row], places: NDArray[np.int64]) -> NDArray[np.int64]:
    """Tokens of the stream at ``[N, L]`` places in rows."""
    index = np.array([row.parts[0].start for row in rows])[:, None] + places
    for i, row in enumerate(rows):
        if len(row.parts) > 1:
            index[i] = row_tokens(row)[places[i]]
    return index
