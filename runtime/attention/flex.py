"""FlexAttention: a fused kernel that skips the blocks of the mask in which nobody sees anybody."""

# T tokens of the stream, S keys, H heads, K key/value heads, D head width

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import cast

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from muxtune.batches import Row
from runtime.attention.backend import AttentionBackend, AttentionSite, Placement
from runtime.attention.carried_kv import CarriedPlaces
from runtime.attention.stream import Stream, StreamPlacement, build_stream

_Attend = Callable[..., object]
_uncompiled = cast("_Attend", flex_attention)

_NARROWEST = 16
"""Head width below which its kernels do not go."""


class FlexAttention(AttentionBackend):
    """The mask of the reference, by blocks of 128 x 128 and compiled into the kernel.

    On a CPU torch has its forward only; uncompiled, which materializes all scores, it is checked there.
    """

    name = "flex"
    isolates = False

    def refusal(self, site: AttentionSite) -> str | None:
        """Where torch has no backward, or its kernels do not take the content."""
        if site.device != "cuda":
            return "a CUDA device: torch has no backward of it elsewhere"
        if site.dtype == torch.float64:
            return "float32, float16 or bfloat16"
        if site.head_dim < _NARROWEST:
            return f"heads of width {_NARROWEST} or more"
        return None

    def place(self, rows: Sequence[Row], tokens: int, places: CarriedPlaces, device: str) -> Placement:
        """See :class:`AttentionBackend`."""
        return _FlexPlacement(build_stream(rows, tokens, places, device))


class _FlexPlacement(StreamPlacement):
    def __init__(self, stream: Stream) -> None:
        super().__init__(stream)
        queries, keys = len(stream.query_sequence_T), len(stream.key_sequence_S)

        def visible(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return stream.visible(query, key)

        device = stream.query_sequence_T.device
        self._mask = create_block_mask(visible, None, None, queries, keys, device=str(device))

    def attend_stream(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        attend = _compiled() if q.is_cuda else _uncompiled
        return cast("Tensor", attend(q, k, v, block_mask=self._mask, enable_gqa=q.shape[1] != k.shape[1]))


@cache
def _compiled() -> _Attend:
    """Compiled at the first call, once for all lengths that occur."""
    return cast("_Attend", torch.compile(flex_attention, dynamic=True))
