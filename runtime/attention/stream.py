"""Attention over the whole stream at once: who sees whom is a question of sequence and position.

Plain autograd on purpose: with a dense mask this is the reference of all other backends.
"""

# T tokens of the stream, S keys: those in front of sequences, what earlier micro-batches have left, then the
# stream's own
# H heads, K key/value heads, D head width, M tokens whose keys and values later micro-batches need

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from muxtune.batches import Row
from runtime.attention.backend import Placement, row_tokens
from runtime.attention.carried_kv import CarriedPlaces, leaving_rows
from runtime.attention.rope import RopeTables, rotated
from runtime.ops.to_device import on_device


@dataclass(frozen=True, slots=True)
class Stream:
    """Sequence and position of every query and key of a micro-batch."""

    query_sequence_T: Tensor
    """Number of the sequence; tokens without one have a number below 0 to themselves."""
    query_position_T: Tensor
    key_sequence_S: Tensor
    key_position_S: Tensor
    leaves_M: Tensor | None
    """Tokens whose keys and values later micro-batches need."""
    fronts: Tensor | None = None
    """Places of the keys in front of sequences, for each sequence anew; None if there are none."""
    in_front: int = 0
    """How many of them there are, before they are repeated."""

    def visible(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether queries see keys, by their places; the arguments broadcast."""
        same: Tensor = self.query_sequence_T[query] == self.key_sequence_S[key]
        return same & (self.key_position_S[key] <= self.query_position_T[query])


def build_stream(rows: Sequence[Row], tokens: int, places: CarriedPlaces, device: str) -> Stream:
    """Number the tokens of a micro-batch; arguments as of ``AttentionBackend.place``."""
    sequence = -1 - np.arange(tokens)
    position = np.zeros(tokens, dtype=np.int64)
    left_sequence = np.full(places.tokens, -1 - tokens)  # seen by nobody here
    left_position = np.zeros(places.tokens, dtype=np.int64)
    fronts: list[NDArray[np.int64]] = []
    front_sequence: list[NDArray[np.int64]] = []
    for number, row in enumerate(rows):
        own = row_tokens(row)
        sequence[own] = number
        position[own] = row.carried + np.arange(len(own))
        if row.carried:
            front, earlier = np.split(places.of(row), [row.front])
            left_sequence[earlier] = number
            left_position[earlier] = row.front + np.arange(len(earlier))
            fronts.append(front)
            front_sequence.append(np.full(row.front, number))
    # The keys in front are those of several sequences: each has them for itself.
    left_sequence = np.concatenate([*front_sequence, left_sequence[places.in_front :]])
    repeated = np.concatenate([*map(np.arange, map(len, fronts)), left_position[places.in_front :]])
    leaving = [row_tokens(row) for row in leaving_rows(rows)]
    return Stream(
        query_sequence_T=on_device(sequence, device),
        query_position_T=on_device(position, device),
        key_sequence_S=on_device(np.concatenate([left_sequence, sequence]), device),
        key_position_S=on_device(np.concatenate([repeated, position]), device),
        leaves_M=on_device(np.concatenate(leaving), device) if leaving else None,
        fronts=on_device(np.concatenate(fronts), device) if places.in_front else None,
        in_front=places.in_front,
    )


class StreamPlacement(Placement):
    """Every query and every key in one call.

    Args:
        stream: Stream of the micro-batch.
    """

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def attend(
        self, qkv_TF: Tensor, heads: int, kv_heads: int, rope: RopeTables | None, left: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """See :class:`Placement`."""
        stream = self._stream
        x = qkv_TF.view(len(qkv_TF), heads + 2 * kv_heads, -1)
        q, k, v = x.split((heads, kv_heads, kv_heads), dim=1)
        if rope is not None:
            # Padding behind keys in front may have positions that the backbone has not.
            positions_T = stream.query_position_T.clamp(max=len(rope.cos) - 1)
            cos, sin = rope.cos[positions_T], rope.sin[positions_T]
            q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        own = torch.cat((k, v), dim=1).flatten(1)
        if stream.fronts is not None:
            in_front, others = torch.cat([*left]).tensor_split([stream.in_front])
            left = [in_front.index_select(0, stream.fronts), others]
        keys_values = torch.cat([*left, own]).view(-1, 2 * kv_heads, q.shape[2])
        k, v = keys_values.split(kv_heads, dim=1)
        attended = self.attend_stream(*(each.transpose(0, 1)[None] for each in (q, k, v)))
        result = attended[0].transpose(0, 1).flatten(1)
        result = result.masked_fill(stream.query_sequence_T[:, None] < 0, 0.0)
        return result, None if stream.leaves_M is None else own.index_select(0, stream.leaves_M)

    @abstractmethod
    def attend_stream(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of ``[1, H, T, D]`` queries to ``[1, K, S, D]`` keys and values, as the queries."""
