"""What a matrix product costs on a GPU: the kernels of its library, their times, and which the library takes.

A product ``y[m, n] = x[m, k] W[k, n]`` is cut into tiles of the output (and of k: split-k), one per thread
block. Every cut is a candidate kernel. Its time follows from the blocks' waves over the multiprocessors, from
the traffic to memory and to the L2 cache, from the power that the device may draw, and from fixed overheads.
Operands are read from memory once: the order of the blocks keeps what a wave shares in the L2 cache, and a
coefficient for further reads changed errors on models left out by 0.06 % at most. The library does not always
take the fastest kernel: its heuristics have preferences of their own, which are coefficients too. The result
is the mean (of logarithms) over the candidates under the probability that the library takes them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, ConfigDict, Field

from muxtune.costs.devices import FitRecord, load_part
from muxtune.support.errors import SpecError

# S shapes, C candidates (tiles x splits), tile by tile
Floats = NDArray[np.float64]

_ELEMENT_BYTES = 2
"""fp16 and bf16."""
_PARTIAL_BYTES = 4
"""Sums of split-k are kept in fp32."""
_CHUNK = 1024
"""Shapes at a time: their candidates stay in the processor's cache."""


class GemmCoefficients(BaseModel):
    """One device. Facts of the device and its library first, then what is fitted."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: str
    sm_count: int = Field(gt=0)
    k_step: int = Field(gt=0)
    """Elements of k that a block works on at a time."""
    resident_elements: int = Field(gt=0)
    """Outputs of all blocks that fit on a multiprocessor at once: its registers."""
    resident_blocks: int = Field(gt=0)
    """Most blocks on a multiprocessor at once."""
    tiles: tuple[tuple[int, int], ...] = Field(min_length=1)
    """Rows and columns of the output that one block computes, as the library offers them."""
    splits: tuple[int, ...] = Field(min_length=1)
    """Parts of k, alike."""

    launch_s: float = Field(ge=0)
    flops_per_s: float = Field(gt=0)
    """Rate of tensor cores that wait for nothing, at the clock of a kernel that power does not limit."""
    sustained_flops_per_s: float = Field(gt=0)
    """Most useful work that the power limit allows for long; idle cores leave theirs to the busy ones."""
    idle_s: float = Field(ge=0)
    """Lull between two kernels as they were measured, in which power is saved for the next."""
    bytes_per_s: float = Field(gt=0)
    l2_bytes_per_s: float = Field(gt=0)
    wave_s: float = Field(ge=0)
    """Filling and draining the pipelines of a wave of blocks."""
    k_step_s: float = Field(ge=0)
    """Shortest time of one k step: a block that is alone cannot hide it."""
    overlap: float = Field(ge=1)
    """Norm that joins compute, memory and L2 time: 1 is their sum, infinity their maximum."""
    exposed_store: float = Field(ge=0)
    """Share of the last wave's output whose store nothing hides."""
    split_s: float = Field(ge=0)
    """Second kernel, which adds the parts of split-k."""
    spread: float = Field(gt=0)
    """Logarithm of time within which the library hardly tells kernels apart."""
    split_reluctance: float
    """Reluctance of the library to take a kernel, as a logarithm of time (0.1: as if it took 10 % longer),
    per logarithm of its number of parts."""
    tile_reluctance: tuple[float, ...]
    """Reluctance to take each tile, as a logarithm of time."""
    part_wave_reluctance: float
    """Reluctance per logarithm of the multiprocessors that a kernel of less than one wave leaves idle."""

    fit: FitRecord


class Candidates(NamedTuple):
    """Kernels of a library, whatever they multiply; every field is ``[C]``."""

    tile_m: Floats
    tile_n: Floats
    """Rows and columns of the output that a block computes."""
    splits: Floats
    """Parts of k."""
    reluctance: Floats
    """Reluctance of the library to take it, as a logarithm of time."""
    slots: Floats
    """Blocks on all multiprocessors at once."""
    block_step_s: Floats
    """Seconds of a k step of as many blocks as there are multiprocessors."""
    full_step_s: Floats
    """Seconds of a k step of a full wave."""


def _candidates(c: GemmCoefficients) -> Candidates:
    """The kernels that the library offers, tile by tile."""
    facts = c.sm_count, c.k_step, c.k_step_s, c.flops_per_s, c.resident_elements, c.resident_blocks
    return _known_candidates(c.tiles, c.splits, c.tile_reluctance, c.split_reluctance, *facts)


@lru_cache(maxsize=64)  # a search prices products one by one
def _known_candidates(
    tiles: tuple[tuple[int, int], ...],
    parts: tuple[int, ...],
    tile_reluctance: tuple[float, ...],
    split_reluctance: float,
    sm_count: int,
    k_step: int,
    k_step_s: float,
    flops_per_s: float,
    resident_elements: int,
    resident_blocks: int,
) -> Candidates:
    tile_m, tile_n = (np.repeat([float(tile[side]) for tile in tiles], len(parts)) for side in (0, 1))
    splits = np.tile(np.array(parts, dtype=np.float64), len(tiles))
    resident = np.clip(np.round(resident_elements / (tile_m * tile_n)), 1, resident_blocks)
    block_step_s = 2 * tile_m * tile_n * k_step * sm_count / flops_per_s
    return Candidates(
        tile_m=tile_m,
        tile_n=tile_n,
        splits=splits,
        reluctance=np.repeat(tile_reluctance, len(parts)) + split_reluctance * np.log(splits),
        slots=resident * sm_count,
        block_step_s=block_step_s,
        full_step_s=_at_least(resident * block_step_s, k_step_s),
    )


def load_gemm(device: str) -> GemmCoefficients:
    """Coefficients that ship with the project.

    Raises:
        UserError: No such device.
    """
    return load_part(device, "gemm", GemmCoefficients)


def gemm_seconds(coefficients: GemmCoefficients, m: ArrayLike, n: ArrayLike, k: ArrayLike) -> Floats:
    """Seconds of ``y[m, n] = x[m, k] W[k, n]`` in 16-bit floating point, elementwise over broadcast arrays.

    Args:
        coefficients: Coefficients of the device.
        m: Rows (tokens), positive.
        n: Output features, positive.
        k: Input features, positive.
    """
    return on_distinct_shapes(lambda shapes: _expected_seconds(coefficients, shapes), m, n, k)


class Kernels(NamedTuple):
    """Candidates for some shapes; both fields are ``[S, C]``."""

    seconds: Floats
    belief: Floats
    """Logarithm of the time that the library acts as if it expected."""


def candidate_kernels(c: GemmCoefficients, m: Floats, n: Floats, k: Floats) -> Kernels:
    """Time of every candidate, and what the library seems to think of it.

    Args:
        c: Coefficients of the device.
        m: Rows, ``[S, 1]``.
        n: Output features, ``[S, 1]``.
        k: Input features, ``[S, 1]``.
    """
    tile_m, tile_n, splits, reluctance, slots, block_step_s, full_step_s = _candidates(c)
    blocks_m, blocks_n = np.ceil(m / tile_m), np.ceil(n / tile_n)
    blocks = blocks_m * blocks_n * splits
    k_steps = np.ceil(k / (splits * c.k_step))

    # Waves of blocks: full ones, and a last one whose blocks share the multiprocessors evenly.
    full = np.floor(blocks / slots)
    last = np.ceil((blocks - full * slots) / c.sm_count)
    compute_s = full * (k_steps * full_step_s + c.wave_s)
    compute_s += (last > 0) * (k_steps * _at_least(last * block_step_s, c.k_step_s) + c.wave_s)

    x_bytes, w_bytes, y_bytes = (_ELEMENT_BYTES * size for size in (m * k, n * k, m * n))
    memory_s = (x_bytes + w_bytes + y_bytes) / c.bytes_per_s
    l2_s = blocks * k_steps * (c.k_step * _ELEMENT_BYTES * (tile_m + tile_n)) / c.l2_bytes_per_s

    p = c.overlap
    busy_s = (compute_s**p + memory_s**p + l2_s**p) ** (1 / p)
    power_s = np.maximum(2 * m * n * k / c.sustained_flops_per_s - c.idle_s, 0)
    seconds = np.sqrt(_at_least(busy_s**2, power_s**2)) + c.launch_s  # a sharp corner: norm 8
    last_bytes = np.minimum(y_bytes, slots / splits * tile_m * tile_n * _ELEMENT_BYTES)
    seconds += c.exposed_store * last_bytes / c.bytes_per_s
    partial_bytes = (splits + 1) * m * n * _PARTIAL_BYTES
    seconds += (splits > 1) * (c.split_s + partial_bytes / c.l2_bytes_per_s)

    belief = np.log(seconds) + reluctance
    belief += c.part_wave_reluctance * np.maximum(np.log(c.sm_count / blocks), 0)
    return Kernels(seconds, belief)


def expected_seconds(kernels: Kernels, spread: float) -> Floats:
    """Geometric mean over the candidates, weighted by how likely the library takes them, ``[S]``."""
    weight = np.exp((kernels.belief.min(axis=1, keepdims=True) - kernels.belief) / spread)
    mean: Floats = (weight * np.log(kernels.seconds)).sum(axis=1) / weight.sum(axis=1)
    return np.exp(mean)


def on_distinct_shapes(price: Callable[[Floats], Floats], m: ArrayLike, n: ArrayLike, k: ArrayLike) -> Floats:
    """Broadcast m, n and k, price every distinct shape once, and spread the prices out again.

    Args:
        price: Function from shapes ``[S, 3]`` to seconds ``[S]``; called with at most a thousand shapes at a
            time.
        m: Rows.
        n: Output features.
        k: Input features.

    Raises:
        SpecError: A dimension is not positive.
    """
    shapes = np.stack(np.broadcast_arrays(m, n, k), axis=-1).astype(np.float64)
    rows = shapes.reshape(-1, 3)
    if wrong := rows[~(rows > 0).all(axis=1)].tolist():
        raise SpecError("(m, n, k)", tuple(wrong[0]), "numbers above 0")
    if len(rows) == 1:  # as searches ask, again and again
        return price(rows).reshape(shapes.shape[:-1])
    distinct, inverse = np.unique(rows, axis=0, return_inverse=True)
    prices = [price(distinct[start : start + _CHUNK]) for start in range(0, len(distinct), _CHUNK)]
    return np.concatenate([*prices, np.empty(0)])[inverse].reshape(shapes.shape[:-1])


def _expected_seconds(c: GemmCoefficients, shapes: Floats) -> Floats:
    return expected_seconds(candidate_kernels(c, *np.hsplit(shapes, 3)), c.spread)


def _at_least(value: Floats, floor: Floats | float) -> Floats:
    """Maximum with a soft corner (norm 4)."""
    square, floor_square = value * value, floor * floor
    return np.sqrt(np.sqrt(square * square + floor_square * floor_square))
