"""What low-rank adapters cost on a GPU: a pair alone, and the pairs of several tasks in shared launches.

Alone, a pair runs as torch operations: two thin products forward, four backward, additions into what the
frozen product gave, and conversions where its factors have more precision than the backbone. Grouped, the
pairs of all tasks at one linear run in a launch per step (shrink, add the parts, expand; backward also the
factors' gradients), with conversions inside: their tiles share the SMs, and the bytes are moved once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from typing import NamedTuple

from muxtune.costs.gpu import Gpu
from muxtune.graph.operators import Phase


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One task's pair at one linear."""

    in_features: int
    out_features: int
    r: int
    tokens: int


PAIR_KIND = "lora"
"""Kind of the operators that these are."""

PAIR_KERNELS: dict[Phase, int] = {"fwd": 2, "bwd": 6}
"""Products with the addition in their epilogue; backward also adds both gradients to those so far."""

GROUP_KERNELS: dict[Phase, int] = {"fwd": 3, "bwd": 5}
"""Shrink, sum of its parts, expand; backward also a launch per side for the factors' gradients."""


def pair_kernels(phase: Phase, *, converts: bool) -> int:
    """Kernels of a pair alone; conversions come with another one for each large tensor, and an addition."""
    extra = {"fwd": 2, "bwd": 3}[phase] if converts else 0
    return PAIR_KERNELS[phase] + extra


def pair_seconds(gpu: Gpu, pair: Pair, phase: Phase, *, element_bytes: int, factor_bytes: int) -> float:
    """Seconds of a pair alone.

    Args:
        gpu: The GPU.
        pair: The pair, with at least one token.
        phase: The backward gives both factors' gradients and adds to the input's.
        element_bytes: Bytes of an element of the backbone's activations.
        factor_bytes: Bytes of an element of the factors, 4 for PEFT's float32.
    """
    i, o, r, t = pair.in_features, pair.out_features, pair.r, pair.tokens

    def product_s(m: int, n: int, k: int) -> float:
        return gpu.product_s(m, n, k, element_bytes=factor_bytes)

    convert_s = _convert_s(gpu, t * i, element_bytes, factor_bytes)
    if phase == "fwd":
        added_s = _add_s(gpu, t * o, element_bytes, factor_bytes)
        return convert_s + product_s(t, r, i) + product_s(t, o, r) + added_s
    convert_s += _convert_s(gpu, t * o, element_bytes, factor_bytes)
    products_s = product_s(t, r, o) + product_s(t, i, r) + product_s(r, i, t) + product_s(o, r, t)
    summed_s = gpu.stream_s(3 * factor_bytes * r * (i + o), launches=2)
    return convert_s + products_s + _add_s(gpu, t * i, element_bytes, factor_bytes) + summed_s


def _convert_s(gpu: Gpu, elements: int, element_bytes: int, factor_bytes: int) -> float:
    if element_bytes == factor_bytes:
        return 0.0
    return gpu.stream_s((element_bytes + factor_bytes) * elements)


def _add_s(gpu: Gpu, elements: int, element_bytes: int, factor_bytes: int) -> float:
    """Into a tensor of the backbone's dtype: an epilogue that reads it too, or a kernel of its own."""
    if element_bytes == factor_bytes:
        return gpu.stream_s(element_bytes * elements, launches=0)
    return gpu.stream_s((2 * element_bytes + factor_bytes) * elements)


TILE_TOKENS = 64
TILE_COLUMNS = 128
TILE_RANK = 16
SPLIT_K = 1024
OUTER_COLUMNS = 64
"""Tiles of grouped launches, as the runtime's kernels cut them: tokens, columns of an output, ranks, columns
of an input that one tile sums up, columns of a factor's gradient."""

_FLOAT32_BYTES = 4


_TF32X3 = 6.0
"""Float32 factors are multiplied as three tf32 products, each at half the 16-bit rate."""


def grouped_seconds(
    gpu: Gpu, pairs: Sequence[Pair], phase: Phase, *, element_bytes: int, factor_bytes: int
) -> float:
    """Seconds of the pairs of several tasks at one linear, whose tokens and ranks may differ.

    The tiles of all pairs are counted together, so only the last wave of a launch is partly empty.

    Args:
        gpu: The GPU.
        pairs: Pairs of the tasks, at one linear.
        phase: Forward or backward, as in :func:`pair_seconds`.
        element_bytes: Bytes of an element of the backbone's activations, which are read and written as they
            are.
        factor_bytes: Bytes of an element of the factors.
    """
    filled = [pair for pair in pairs if pair.tokens]
    if not filled:
        return 0.0
    rates = _rates(gpu, factor_bytes)
    launches = list(zip(*(_tiles(p, phase, element_bytes, factor_bytes, rates) for p in filled), strict=True))
    busy_s = sum(
        max(_waves_s(launch, rates), moved_seconds(gpu, sum([tiles.bytes for tiles in launch])))
        for launch in launches
    )
    parts_bytes = sum([_parts_bytes(p, backward=phase == "bwd") for p in filled])
    return GROUP_KERNELS[phase] * gpu.launch_s + busy_s + moved_seconds(gpu, parts_bytes)


def moved_seconds(gpu: Gpu, bytes_: float) -> float:
    """:func:`muxtune.costs.pointwise.stream_seconds` without launches, of one number.

    Without numpy it takes a tenth of the time, and a search prices thousands of groups; the parity test is
    in ``tests/muxtune/costs/test_adapters.py``.
    """
    c = gpu.pointwise
    cached = min(max(2.0 - bytes_ / c.l2_bytes, 0.0), 1.0)
    return bytes_ * (cached / c.l2_bytes_per_s + (1.0 - cached) / c.dram_bytes_per_s)


class _Rates(NamedTuple):
    """Rates of the device that tiles depend on."""

    sm_count: int
    flops_per_s: float
    l2_bytes_per_s: float


def _rates(gpu: Gpu, factor_bytes: int) -> _Rates:
    flops_per_s = gpu.peaks.tensor_flops_per_s
    if factor_bytes == _FLOAT32_BYTES:
        flops_per_s /= _TF32X3
    return _Rates(gpu.pointwise.sm_count, flops_per_s, gpu.pointwise.l2_bytes_per_s)


class _Work(NamedTuple):
    """Work of one pair in one launch: number of tiles, and the bytes and FLOPs of all of them."""

    tiles: int
    bytes: float
    flops: float


class _Tiles(NamedTuple):
    """Tiles of one pair in one launch: how many, their bytes and their seconds."""

    tiles: int
    bytes: float
    busy_s: float
    """Seconds of all tiles, one after the other on one SM."""
    longest_s: float


@lru_cache(maxsize=1 << 16)  # a search puts the same pairs into many groups
def _tiles(
    pair: Pair, phase: Phase, element_bytes: int, factor_bytes: int, rates: _Rates
) -> tuple[_Tiles, ...]:
    """What a pair has in each launch of its group, sums of parts aside."""
    backward = phase == "bwd"
    launches = [launch(pair, element_bytes, factor_bytes, backward=backward) for launch in (_shrink, _expand)]
    if backward:
        launches += [
            _outer(pair, width, element_bytes, factor_bytes)
            for width in (pair.in_features, pair.out_features)
        ]
    tiles = []
    for work in launches:
        # An SM has its share of the L2 cache's rate.
        busy_s = max(work.bytes / rates.l2_bytes_per_s, work.flops / rates.flops_per_s) * rates.sm_count
        tiles.append(_Tiles(work.tiles, work.bytes, busy_s, busy_s / work.tiles))
    return tuple(tiles)


def _shrink(pair: Pair, element_bytes: int, factor_bytes: int, *, backward: bool) -> _Work:
    """Tiles of tokens times parts of the width."""
    width = pair.out_features if backward else pair.in_features
    rows = ceil(pair.tokens / TILE_TOKENS)
    bytes_ = width * (element_bytes * pair.tokens + factor_bytes * rows * pair.r)
    flops = 2.0 * rows * TILE_TOKENS * width * _filled(pair.r)
    return _Work(rows * ceil(width / SPLIT_K), bytes_, flops)


def _parts_bytes(pair: Pair, *, backward: bool) -> float:
    """Bytes that adding up the parts of a shrink moves."""
    splits = ceil((pair.out_features if backward else pair.in_features) / SPLIT_K)
    return float(_FLOAT32_BYTES * (splits + 1) * pair.tokens * pair.r)


def _expand(pair: Pair, element_bytes: int, factor_bytes: int, *, backward: bool) -> _Work:
    """Tiles of tokens and columns, which are read, added to and written."""
    width = pair.in_features if backward else pair.out_features
    rows, columns = ceil(pair.tokens / TILE_TOKENS), ceil(width / TILE_COLUMNS)
    bytes_ = width * (2 * element_bytes * pair.tokens + factor_bytes * rows * pair.r)
    flops = 2.0 * rows * columns * TILE_TOKENS * TILE_COLUMNS * _filled(pair.r)
    return _Work(rows * columns, bytes_, flops)


def _outer(pair: Pair, width: int, element_bytes: int, factor_bytes: int) -> _Work:
    """Gradient of one factor: a tile sums up all tokens of its columns."""
    columns, downs = ceil(width / OUTER_COLUMNS), _FLOAT32_BYTES * pair.tokens * pair.r
    bytes_ = width * (element_bytes * pair.tokens + factor_bytes * pair.r) + columns * downs
    flops = 2.0 * columns * OUTER_COLUMNS * _filled(pair.r) * pair.tokens
    return _Work(columns, bytes_, flops)


def _filled(r: int) -> int:
    return ceil(r / TILE_RANK) * TILE_RANK


def _waves_s(pairs: Sequence[_Tiles], rates: _Rates) -> float:
    """Waves of tiles over the SMs, or the longest tile."""
    tiles = sum([pair.tiles for pair in pairs])
    waves_s = ceil(tiles / rates.sm_count) * sum([pair.busy_s for pair in pairs]) / tiles
    return max(waves_s, *[pair.longest_s for pair in pairs])
