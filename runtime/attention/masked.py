"""The reference: scaled dot-product attention with a dense mask over the whole stream."""

# T tokens of the stream, S keys, H heads, K key/value heads, D head width

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own abbreviation
from torch import Tensor

from muxtune.batches import Row
from runtime.attention.backend import AttentionBackend, AttentionSite, Placement
from runtime.attention.carried_kv import CarriedPlaces
from runtime.attention.stream import Stream, StreamPlacement, build_stream


class MaskedAttention(AttentionBackend):
    """Slow, because most of the mask is empty, and evidently right; it runs everywhere."""

    name = "masked"
    isolates = False

    def refusal(self, site: AttentionSite) -> str | None:
        """Nothing: it trains on any device."""
        return None

    def place(self, rows: Sequence[Row], tokens: int, places: CarriedPlaces, device: str) -> Placement:
        """See :class:`AttentionBackend`."""
        return _MaskedPlacement(build_stream(rows, tokens, places, device))


class _MaskedPlacement(StreamPlacement):
    def __init__(self, stream: Stream) -> None:
        super().__init__(stream)
        self._bias_TS: Tensor | None = None

    def attend_stream(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self._bias(q, k), enable_gqa=grouped)

    def _bias(self, q: Tensor, k: Tensor) -> Tensor:
        """Bias of the scores, one tensor for all layers, so that it is kept once."""
        if self._bias_TS is None:
            query, key = (torch.arange(x.shape[2], device=x.device) for x in (q, k))
            visible = self._stream.visible(query[:, None], key[None])
            self._bias_TS = torch.zeros_like(visible, dtype=q.dtype).masked_fill_(~visible, float("-inf"))
        return self._bias_TS
