"""The Triton kernels of :mod:`runtime.ops.kernels.grouped_lora`.

A row of ``pieces``: 0, 1 tokens; 2, 3 columns; 4 rank; 5 offset in ``down``; 6 offset in packed gradients. A
weight is [rank, columns] on the input side (``ROW_MAJOR``), [columns, rank] on the output side. ``ALIGNED``
says that columns begin and end at multiples of 16, so that a thread loads 16 bytes at once: for bfloat16 on
an A40, the compiler then needs 56 instead of 210 registers. Where a tile begins is a 64-bit address; inside
of it 32 bits are enough, and take fewer registers too. Both operands of a product are masked, since 0 * NaN
is NaN: what a neighbour holds never meets a sum.

With ``DROPS`` what is read or added to on the input side has dropout: a row of ``drops`` is the growth of a
token's state up to the piece's linear, the threshold (0: nothing is dropped), and the rank's first feature.
Masks are those of :mod:`runtime.ops.dropout`, number by number, and are never written anywhere.

Only names of Triton 3.7 are used, the version that torch 2.13 for CUDA brings, and only those that 3.9 still
has. Pointers are annotated as ``tl.tensor``, because Triton looks up what annotations name.
"""

from __future__ import annotations

import triton
import triton.language as tl

_GAMMA = tl.constexpr(0x9E3779B97F4A7C15)
_FIRST_FACTOR = tl.constexpr(0xBF58476D1CE4E5B9)
_SECOND_FACTOR = tl.constexpr(0x94D049BB133111EB)


@triton.jit
def _mix(z: tl.tensor) -> tl.tensor:
    """Output of SplitMix64 for a state."""
    z = (z ^ (z >> 30)) * _FIRST_FACTOR
    z = (z ^ (z >> 27)) * _SECOND_FACTOR
    return z ^ (z >> 31)


@triton.jit
def _kept(keys: tl.tensor, drop: tl.tensor, own_tokens: tl.tensor, columns: tl.tensor) -> tl.tensor:
    """Which columns of which tokens dropout keeps; ``keys`` points at the tokens' states."""
    states = tl.load(keys, mask=own_tokens, other=0).to(tl.uint64, bitcast=True)
    states = _mix(states + tl.load(drop).to(tl.uint64, bitcast=True))
    features = columns + tl.load(drop + 2).to(tl.int32)
    groups = (features // 4 + 1).to(tl.uint64) * _GAMMA
    numbers = _mix(states[:, None] + groups[None, :])
    bits = (numbers >> (features % 4 * 16).to(tl.uint64)[None, :]) & 0xFFFF
    return bits.to(tl.int32) >= tl.load(drop + 1).to(tl.int32)


@triton.jit
def shrink(  # noqa: PLR0913, PLR0917  # a kernel takes no records
    source: tl.tensor,
    stride: int,
    pieces: tl.tensor,
    scales: tl.tensor,
    pointers: tl.tensor,
    tiles: tl.tensor,
    parts: tl.tensor,
    downs: int,
    keys: tl.tensor,
    drops: tl.tensor,
    DROPS: tl.constexpr,
    FACTOR: tl.constexpr,
    OPERAND: tl.constexpr,
    ROW_MAJOR: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    TILE_RANK: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    SPLIT_K: tl.constexpr,
) -> None:
    """One tile of ``scale * source weight^T``, over SPLIT_K columns of its piece."""
    tile = tiles + 3 * tl.program_id(0)
    piece, token = tl.load(tile), tl.load(tile + 1)
    row = pieces + 7 * piece
    first, rank = tl.load(row + 2), tl.load(row + 4).to(tl.int32)
    width = (tl.load(row + 3) - first).to(tl.int32)
    if ALIGNED:
        first, width = tl.multiple_of(first, 16), tl.multiple_of(width, 16)
    rank_stride = width if ROW_MAJOR else 1
    column_stride = 1 if ROW_MAJOR else rank
    weight = tl.multiple_of(tl.load(pointers + piece).to(tl.pointer_type(FACTOR)), 16)
    source_tile = source + token * stride + first
    tokens = tl.arange(0, TILE_TOKENS)
    ranks = tl.load(tile + 2).to(tl.int32) + tl.arange(0, TILE_RANK)
    in_piece = tokens < (tl.load(row + 1) - token).to(tl.int32)
    own_tokens = in_piece[:, None]
    own_ranks = (ranks < rank)[None, :]

    split = tl.program_id(1)
    begin = split * SPLIT_K
    end = tl.minimum(begin + SPLIT_K, width)
    total = tl.zeros((TILE_TOKENS, TILE_RANK), dtype=tl.float32)
    for column in range(begin, end, TILE_COLUMNS):
        columns = column + tl.arange(0, TILE_COLUMNS)
        x = tl.load(
            source_tile + tokens[:, None] * stride + columns[None, :],
            mask=own_tokens & (columns < end)[None, :],
            other=0.0,
        )
        if DROPS:  # noqa: SIM102  # the compiler decides this one
            if tl.load(drops + 3 * piece + 1) > 0:
                token_keys = keys + token + tokens
                x = tl.where(_kept(token_keys, drops + 3 * piece, in_piece, columns), x, 0.0)
        w = tl.load(
            weight + columns[:, None] * column_stride + ranks[None, :] * rank_stride,
            mask=(columns < end)[:, None] & own_ranks,
            other=0.0,
        )
        total = tl.dot(x.to(FACTOR).to(OPERAND), w.to(OPERAND), total, input_precision="tf32x3")
    part = parts + split.to(tl.int64) * downs + tl.load(row + 5) + (token - tl.load(row)) * rank
    tl.store(
        part + tokens[:, None] * rank + ranks[None, :],
        total * tl.load(scales + piece),
        mask=own_tokens & own_ranks,
    )


@triton.jit
def sum_parts(parts: tl.tensor, total: tl.tensor, n: int, SPLITS: tl.constexpr, BLOCK: tl.constexpr) -> None:
    """The partial sums of ``shrink``, in order."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(parts + places, mask=places < n)
    for split in range(1, SPLITS):
        value += tl.load(parts + split * n + places, mask=places < n)
    tl.store(total + places, value, mask=places < n)


@triton.jit
def expand(  # noqa: PLR0913, PLR0917  # a kernel takes no records
    target: tl.tensor,
    stride: int,
    pieces: tl.tensor,
    pointers: tl.tensor,
    members: tl.tensor,
    tiles: tl.tensor,
    down: tl.tensor,
    keys: tl.tensor,
    drops: tl.tensor,
    DROPS: tl.constexpr,
    FACTOR: tl.constexpr,
    OPERAND: tl.constexpr,
    ROW_MAJOR: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    TILE_RANK: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
) -> None:
    """Add ``down weight`` of all pieces that work there to one tile of ``target``."""
    tile = tiles + 3 * tl.program_id(0)
    token, begin, end = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    row = pieces + 7 * tl.load(members + begin)  # tokens and columns are those of all members
    start, first = tl.load(row), tl.load(row + 2)
    width = (tl.load(row + 3) - first).to(tl.int32)
    if ALIGNED:
        first, width = tl.multiple_of(first, 16), tl.multiple_of(width, 16)
    column = tl.program_id(1) * TILE_COLUMNS
    if column < width:  # the grid is that of the widest piece
        tokens = tl.arange(0, TILE_TOKENS)
        columns = column + tl.arange(0, TILE_COLUMNS)
        in_piece = tokens < (tl.load(row + 1) - token).to(tl.int32)
        own_tokens = in_piece[:, None]
        own_columns = (columns < width)[None, :]
        total = tl.zeros((TILE_TOKENS, TILE_COLUMNS), dtype=tl.float32)
        for member in range(begin, end):
            piece = tl.load(members + member)
            row = pieces + 7 * piece
            rank = tl.load(row + 4).to(tl.int32)
            rank_stride = width if ROW_MAJOR else 1
            column_stride = 1 if ROW_MAJOR else rank
            weight = tl.multiple_of(tl.load(pointers + piece).to(tl.pointer_type(FACTOR)), 16)
            down_tile = down + tl.load(row + 5) + (token - start) * rank
            if DROPS:
                others = total  # what other members add has other masks
                total = tl.zeros((TILE_TOKENS, TILE_COLUMNS), dtype=tl.float32)
            for rank0 in range(0, rank, TILE_RANK):
                ranks = rank0 + tl.arange(0, TILE_RANK)
                own_ranks = ranks < rank
                d = tl.load(
                    down_tile + tokens[:, None] * rank + ranks[None, :],
                    mask=own_tokens & own_ranks[None, :],
                    other=0.0,
                )
                w = tl.load(
                    weight + ranks[:, None] * rank_stride + columns[None, :] * column_stride,
                    mask=own_ranks[:, None] & own_columns,
                    other=0.0,
                )
                total = tl.dot(d.to(FACTOR).to(OPERAND), w.to(OPERAND), total, input_precision="tf32x3")
            if DROPS:
                if tl.load(drops + 3 * piece + 1) > 0:
                    token_keys = keys + token + tokens
                    total = tl.where(_kept(token_keys, drops + 3 * piece, in_piece, columns), total, 0.0)
                total += others
        places = target + token * stride + first + tokens[:, None] * stride + columns[None, :]
        before = tl.load(places, mask=own_tokens & own_columns)
        after = (before.to(tl.float32) + total).to(before.dtype)
        tl.store(places, after, mask=own_tokens & own_columns)


@triton.jit
def outer(  # noqa: PLR0913, PLR0917  # a kernel takes no records
    source: tl.tensor,
    stride: int,
    pieces: tl.tensor,
    tiles: tl.tensor,
    down: tl.tensor,
    packed: tl.tensor,
    keys: tl.tensor,
    drops: tl.tensor,
    DROPS: tl.constexpr,
    FACTOR: tl.constexpr,
    OPERAND: tl.constexpr,
    ROW_MAJOR: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    TILE_RANK: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
) -> None:
    """One tile of ``down^T source``, over all tokens of its piece."""
    tile = tiles + 2 * tl.program_id(0)
    piece = tl.load(tile)
    row = pieces + 7 * piece
    start, first = tl.load(row), tl.load(row + 2)
    length = (tl.load(row + 1) - start).to(tl.int32)
    width = (tl.load(row + 3) - first).to(tl.int32)
    if ALIGNED:
        first, width = tl.multiple_of(first, 16), tl.multiple_of(width, 16)
    column = tl.program_id(1) * TILE_COLUMNS
    if column < width:
        rank = tl.load(row + 4).to(tl.int32)
        ranks = tl.load(tile + 1).to(tl.int32) + tl.arange(0, TILE_RANK)
        columns = column + tl.arange(0, TILE_COLUMNS)
        own_ranks = (ranks < rank)[:, None]
        own_columns = (columns < width)[None, :]
        tokens = tl.arange(0, TILE_TOKENS)
        down_tile = down + tl.load(row + 5)
        source_tile = source + start * stride + first
        total = tl.zeros((TILE_RANK, TILE_COLUMNS), dtype=tl.float32)
        for token in range(0, length, TILE_TOKENS):
            own_tokens = tokens < length - token
            d = tl.load(
                down_tile + tokens[None, :] * rank + ranks[:, None],
                mask=own_ranks & own_tokens[None, :],
                other=0.0,
            )
            x = tl.load(
                source_tile + tokens[:, None] * stride + columns[None, :],
                mask=own_tokens[:, None] & own_columns,
                other=0.0,
            )
            if DROPS:  # noqa: SIM102  # the compiler decides this one
                if tl.load(drops + 3 * piece + 1) > 0:
                    token_keys = keys + start + token + tokens
                    x = tl.where(_kept(token_keys, drops + 3 * piece, own_tokens, columns), x, 0.0)
            total = tl.dot(
                d.to(FACTOR).to(OPERAND), x.to(FACTOR).to(OPERAND), total, input_precision="tf32x3"
            )
            down_tile += TILE_TOKENS * rank
            source_tile += TILE_TOKENS * stride
        rank_stride = width if ROW_MAJOR else 1
        column_stride = 1 if ROW_MAJOR else rank
        places = packed + tl.load(row + 6) + ranks[:, None] * rank_stride + columns[None, :] * column_stride
        tl.store(places, total.to(FACTOR), mask=own_ranks & own_columns)
