"""What causal attention costs on a GPU, by sequence lengths, from published rates of FlashAttention.

A kernel cuts the queries of each head of each sequence into blocks of 128 (backward: the keys). A block takes
a fixed start and its tiles of 128 x 128 scores that are not masked altogether; blocks run in waves over the
SMs. So short sequences are slow for two reasons: tiles that are mostly empty, and starts.

The constants come from rates that the kernels' authors published, and from nothing else: FlashAttention-2
(arXiv 2307.08691) on A100, at best 230 TFLOP/s forward (73 % of the peak) and 63 % of the peak backward;
FlashAttention-2 and -3 on H100 by sequence length (arXiv 2407.08608, figures 5 and 6). On H100 we take
FlashAttention-3; the same figures show cuDNN's kernels, which torch prefers there, close to it. A40 is A100
by the ratio of the data sheets' tensor peaks, 149.7 : 312. They stand in each device's ``device.json``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from muxtune.costs.pointwise import PointwiseCoefficients, stream_seconds
from muxtune.graph.operators import Phase

Array = NDArray[np.float64]

TILE = 128
"""Queries and keys of a tile."""

MATMULS: dict[Phase, float] = {"fwd": 2.0, "bwd": 5.0}
"""Products per tile: scores and output; backward recomputes the scores and has four gradients."""


class Rate(NamedTuple):
    """Speed of one kernel at one head width."""

    flops_per_s: float
    """FLOPs per second inside of tiles, on the whole device."""
    start_tiles: float
    """Fixed time of a block, in tiles."""


@dataclass(frozen=True, slots=True)
class AttentionKernel:
    """Forward and backward rates by head width; what lies between two widths is interpolated."""

    forward: Mapping[int, Rate]
    backward: Mapping[int, Rate]

    def rate(self, head_dim: int, phase: Phase) -> Rate:
        """Rate at a head width; beyond the known widths that of the nearest."""
        known = self.forward if phase == "fwd" else self.backward
        widths = sorted(known)
        values = np.array([known[width] for width in widths])
        flops_per_s, start_tiles = (float(np.interp(head_dim, widths, column)) for column in values.T)
        return Rate(flops_per_s, start_tiles)


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """Heads on one rank."""

    heads: int
    kv_heads: int
    head_dim: int


def attention_seconds(
    kernel: AttentionKernel,
    coefficients: PointwiseCoefficients,
    heads: Heads,
    sequences: ArrayLike,
    queries: ArrayLike,
    keys: ArrayLike | None = None,
    *,
    phase: Phase = "fwd",
) -> Array:
    """Seconds of attention of equally long sequences, each of which attends to itself; arguments broadcast.

    Args:
        kernel: Attention kernel of the device.
        coefficients: Coefficients of the device: SMs, launches and bytes.
        heads: Attention heads of the backbone.
        sequences: Number of sequences.
        queries: Queries per sequence; the last of its keys, as in a chunk that follows others.
        keys: Keys per sequence, as many as queries unless given.
        phase: The backward gives the gradients of queries, keys and values.
    """
    sequences_, queries_ = (np.asarray(x, dtype=np.float64) for x in (sequences, queries))
    keys_ = queries_ if keys is None else np.asarray(keys, dtype=np.float64)
    tiles = visible_tiles(queries_, keys_)
    query_blocks, key_blocks = np.ceil(queries_ / TILE), np.ceil(keys_ / TILE)
    blocks, longest = (query_blocks, key_blocks) if phase == "fwd" else (key_blocks, query_blocks)
    rate = kernel.rate(heads.head_dim, phase)
    # Kernels are compiled for widths that are multiples of 32.
    width = np.ceil(heads.head_dim / 32) * 32
    tile_s = MATMULS[phase] * 2 * TILE**2 * width * coefficients.sm_count / rate.flops_per_s
    waves = np.ceil(sequences_ * heads.heads * blocks / coefficients.sm_count)
    mean_block = tiles / np.maximum(blocks, 1.0)
    # Blocks of unequal length fill the gaps of a wave, so its length is the mean; the longest is a bound.
    compute_s = tile_s * np.maximum(waves * (mean_block + rate.start_tiles), longest + rate.start_tiles)
    launches = 1 if phase == "fwd" else _BACKWARD_KERNELS
    bytes_ = sequences_ * _bytes_per_sequence(heads, queries_, keys_, phase)
    moved_s = stream_seconds(coefficients, bytes_, launches=0)
    busy_s = np.where(sequences_ > 0, np.maximum(compute_s, moved_s), 0.0)
    return np.asarray(launches * coefficients.launch_s + busy_s)


_BACKWARD_KERNELS = 3
"""Row sums of gradient times output, the gradients, and the conversion of the queries' gradient."""


def visible_tiles(queries: ArrayLike, keys: ArrayLike) -> Array:
    """Tiles of a causal mask with something visible, where the queries are the last of the keys."""
    queries_, keys_ = np.asarray(queries, dtype=np.float64), np.asarray(keys, dtype=np.float64)
    before = keys_ - queries_
    full = np.maximum(np.ceil(queries_ / TILE) - 1, 0)
    # Query block i ends at query (i + 1) * TILE, the last one at the last query.
    inner = full * np.ceil(before / TILE) + full * (full + 1) / 2
    return np.asarray(inner + np.where(queries_ > 0, np.ceil(keys_ / TILE), 0.0))


def _bytes_per_sequence(heads: Heads, queries: Array, keys: Array, phase: Phase) -> Array:
    q = queries * heads.heads * heads.head_dim
    kv = 2 * keys * heads.kv_heads * heads.head_dim
    if phase == "fwd":
        return np.asarray(2 * (2 * q + kv))
    # Reads q, k, v, output and its gradient, writes three gradients; that of q is summed up in float32.
    return np.asarray(2 * (4 * q + 2 * kv) + 8 * q)
