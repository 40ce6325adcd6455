"""What an attention backend is: it says where it runs, and lays out micro-batches for itself."""

# T tokens of the stream, H heads, K key/value heads, D head width, F = (H + 2 K) D features of q|k|v
# M tokens whose keys and values later micro-batches need

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from muxtune.batches import Row
from muxtune.graph.attention_backends import AttentionName
from runtime.attention.carried_kv import CarriedPlaces
from runtime.attention.rope import RopeTables


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSite:
    """Where attention is to run, and on what."""

    device: str
    """Type of a torch device: ``cpu``, ``cuda``."""
    dtype: torch.dtype
    head_dim: int
    capability: tuple[int, int] | None = None
    """Compute capability of the GPU; None where it is not known, or there is none."""


class Placement(ABC):
    """Where the sequences of one micro-batch go, and attention inside each of them."""

    @abstractmethod
    def attend(
        self, qkv_TF: Tensor, heads: int, kv_heads: int, rope: RopeTables | None, left: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of every token to itself and the tokens before it in its own sequence.

        Args:
            qkv_TF: Queries, keys and values side by side.
            heads: H, the heads of queries.
            kv_heads: K, the heads of keys and values; a divisor of H.
            rope: Rotates queries and keys by their positions; None for learned positions.
            left: Keys and values, each ``[M', 2 K D]``, in front of tasks' sequences, then those that earlier
                micro-batches have left.

        Returns:
            ``[T, H D]``, zero where no sequence is; and keys and values ``[M, 2 K D]`` that later
            micro-batches need, None if they need none.
        """


class AttentionBackend(ABC):
    """A way to compute causal attention inside the sequences of a flat stream."""

    name: ClassVar[AttentionName]
    isolates: ClassVar[bool]
    """Whether a NaN stays in its own sequence. A masked score is minus infinity, but its weight, 0, is
    multiplied with the value all the same, and 0 times NaN is NaN: tasks of one call are not apart then."""

    @abstractmethod
    def refusal(self, site: AttentionSite) -> str | None:
        """Why it cannot train there, as the end of "it needs ..."; None if it can."""

    @abstractmethod
    def place(self, rows: Sequence[Row], tokens: int, places: CarriedPlaces, device: str) -> Placement:
        """Lay out a micro-batch.

        Args:
            rows: What lies of each sequence in it; at least one.
            tokens: T, the tokens of the stream.
            places: Places of keys in front, and of what earlier micro-batches of the carry group have left.
            device: Device of index tensors.
        """


def row_tokens(row: Row) -> NDArray[np.int64]:
    """Tokens of the stream that belong to a row, in the order of the sequence."""
    return np.concatenate([np.arange(part.start, part.start + part.row_tokens) for part in row.parts])


def side_by_side(k: Tensor, v: Tensor) -> Tensor:
    """Keys and values of rows, ``[N, K, L, D]``, slot by slot: ``[N L, 2 K D]``."""
    return torch.cat((k, v), dim=1).transpose(1, 2).flatten(2).flatten(0, 1)
