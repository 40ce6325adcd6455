"""FlashAttention on sequences of any length in one call, without padding and without a mask.

``torch.nested`` has the same: on CUDA its jagged layout calls this very kernel, and on a CPU it has no causal
attention ("Nested tensors for query / key are not supported when is_causal=True", torch 2.13), so there is no
backend of that name.
"""

# P tokens that belong to sequences, S their keys, N sequences, H heads, K key/value heads, D head width

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor

from muxtune.batches import Row
from runtime.attention.backend import AttentionBackend, AttentionSite, Placement, row_tokens
from runtime.attention.carried_kv import CarriedPlaces
from runtime.attention.rows import Ends, Placed, RowGroup, RowPlacement, build_layout, carried_source
from runtime.ops.to_device import on_device

_DTYPES = (torch.float16, torch.bfloat16)
_WIDTH_MULTIPLE, _WIDEST = 8, 256
"""Head widths that the kernel has been compiled for."""
_CAPABILITY = (8, 0)
"""Least compute capability of a GPU that runs it."""


class VarlenAttention(AttentionBackend):
    """All sequences of a micro-batch follow each other in one row; the kernel is told where they end."""

    name = "varlen"
    isolates = True

    def refusal(self, site: AttentionSite) -> str | None:
        """What FlashAttention needs and does not have there; None where it runs."""
        if site.device != "cuda":
            return "a CUDA device"
        if site.dtype not in _DTYPES:
            return "float16 or bfloat16"
        if site.head_dim % _WIDTH_MULTIPLE or site.head_dim > _WIDEST:
            return f"heads whose width is a multiple of {_WIDTH_MULTIPLE}, and {_WIDEST} at most"
        if site.capability is not None and site.capability < _CAPABILITY:
            return "a GPU of compute capability 8.0 or later"
        return None

    def place(self, rows: Sequence[Row], tokens: int, places: CarriedPlaces, device: str) -> Placement:
        """See :class:`AttentionBackend`."""
        index = np.concatenate([row_tokens(row) for row in rows])
        queries = np.array([row.tokens for row in rows])
        keys = np.array([row.carried + row.tokens for row in rows])
        begins = np.cumsum(queries) - queries
        carried = bool((keys > queries).any())
        source = None
        if carried:
            sources = [carried_source(row, places, int(at)) for row, at in zip(rows, begins, strict=True)]
            source = on_device(np.concatenate(sources), device)
        # With keys in front, a padded row may be longer than the backbone has positions.
        lasts = [row.length if row.front else row.tokens for row in rows]
        positions = [
            row.carried + np.minimum(np.arange(row.tokens), last - 1)
            for row, last in zip(rows, lasts, strict=True)
        ]
        query_ends = _ends(queries, device)
        group = RowGroup(
            rows=1,
            length=len(index),
            start=int(index[0]),
            index=None if bool((np.diff(index) == 1).all()) else on_device(index, device),
            positions=on_device(np.concatenate(positions)[None], device),
            source=source,
            ends=Ends(
                queries=query_ends,
                keys=_ends(keys, device) if carried else query_ends,
                longest_queries=int(queries.max()),
                longest_keys=int(keys.max()),
            ),
        )
        placed = Placed(group, index, np.arange(len(index)))
        return RowPlacement(build_layout(rows, [placed], tokens, device), attend_ends)


def attend_ends(group: RowGroup, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A :class:`~runtime.attention.rows.Kernel`.

    Where a sequence has more keys than queries, FlashAttention's causal mask ends with both: its last query
    sees all keys (``causal_lower_right`` of torch.nn.attention.bias calls the same kernel for that reason).
    """
    from torch.nn.attention.varlen import varlen_attn  # noqa: PLC0415  # a second, which a CPU need not wait

    ends = group.ends
    assert ends is not None
    q_PHD, k_SKD, v_SKD = (each[0].transpose(0, 1) for each in (q, k, v))
    attended = varlen_attn(
        q_PHD,
        k_SKD,
        v_SKD,
        ends.queries,
        ends.keys,
        ends.longest_queries,
        ends.longest_keys,
        window_size=(-1, 0),  # causal
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return cast("Tensor", attended).transpose(0, 1)[None]


def _ends(lengths: np.ndarray, device: str) -> Tensor:
    return on_device(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32), device)
