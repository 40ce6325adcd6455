"""What kernels without matrix products cost on a GPU: launches, latency of the blocks, bytes.

Three kinds of kernels are told apart, after what the measured implementations (Vidur's, which are those of
torch and vLLM) do:

stream  a vectorized element-wise kernel (residual addition, GELU): bytes at the rate of the memory
gather  torch's ``index_select`` of embedding rows: so many elements per second, whatever the memory could do
row     a thread block per token (norms, rotary embedding, SiLU with gate): blocks run in waves over the SMs,
        and a block takes a fixed time and a time per pass of its threads over the row

The rate of the memory falls from that of the L2 cache to that of DRAM as the bytes of a call, of which a part
was just written by the kernel before, outgrow the cache. Latency and bytes overlap, as in
:mod:`muxtune.costs.roofline`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, ConfigDict, Field

from muxtune.costs.devices import FitRecord, load_part
from muxtune.graph.operators import Phase

Array = NDArray[np.float64]
PointwiseKind = Literal["add", "gelu", "gather", "rope", "rms_norm", "layer_norm", "silu_gate"]

ELEMENT_BYTES = 2
"""Bytes of an element of the 16-bit tensors that were measured."""


@dataclass(frozen=True, slots=True)
class PointwiseKernel:
    """What is known of a kernel from its source."""

    streams: int
    """Tensors of the row's width that it reads and writes."""
    backward_streams: int
    """Tensors that its backward reads and writes. Frozen norms have no gradient of their weight."""
    threads: int | None = None
    """Threads of a row's block at most; None if no block belongs to a row."""
    lanes: int = 1
    """Elements of the row that a thread handles per pass."""
    loops: int = 1
    """Loops over parts of the row, one after the other."""


POINTWISE: dict[str, PointwiseKernel] = {
    "add": PointwiseKernel(streams=3, backward_streams=3),
    "gelu": PointwiseKernel(streams=2, backward_streams=3),
    "gather": PointwiseKernel(streams=2, backward_streams=2),
    "rope": PointwiseKernel(streams=2, backward_streams=2, threads=512, lanes=2, loops=2),
    "rms_norm": PointwiseKernel(streams=2, backward_streams=3, threads=1024),
    "layer_norm": PointwiseKernel(streams=2, backward_streams=3, threads=128),
    "silu_gate": PointwiseKernel(streams=3, backward_streams=5, threads=1024),
}
"""Widths: hidden size; of ``rope`` queries and keys together; of ``gelu`` and ``silu_gate`` the MLP's width.

The backward of ``add`` is the addition where two paths' gradients meet, that of ``gather`` a scatter.
"""


class PointwiseCoefficients(BaseModel):
    """Few physical coefficients of a device.

    A row kernel runs ``sm_count * floor(threads_per_sm / threads)`` blocks at once.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: str
    sm_count: int = Field(gt=0)
    threads_per_sm: int = Field(gt=0)
    launch_s: float = Field(gt=0)
    """Seconds from the start to the end of a kernel with next to nothing to do, on the device."""
    dram_bytes_per_s: float = Field(gt=0)
    l2_bytes_per_s: float = Field(gt=0)
    l2_bytes: float = Field(gt=0)
    """A call that moves less stays in the cache; one that moves twice as much finds nothing there."""
    dram_delay: float = Field(ge=1)
    """Time of a pass over a row in DRAM, relative to a pass over one in the cache."""
    overlap: float = Field(ge=1)
    """1: latency and memory time add up; large: only the longer one counts."""
    gather_start_s: float = Field(ge=0)
    """Seconds until the first ids, and then the rows that they point to, have arrived."""
    gather_s: float = Field(ge=0)
    """Seconds per gathered element."""
    gelu_s: float = Field(ge=0)
    """Seconds of arithmetic per element."""
    block_s: float = Field(ge=0)
    """Seconds of a row kernel's block beside its passes: start, reduction, end."""
    pass_s: dict[str, float]
    """Seconds of a pass of a block's threads over a row in the L2 cache, by row kernel."""
    fit: FitRecord


@lru_cache(maxsize=16)
def load_pointwise(device: str) -> PointwiseCoefficients:
    """Coefficients that ship with the project.

    Raises:
        UserError: No such device.
    """
    return load_part(device, "pointwise", PointwiseCoefficients)


def stream_seconds(coefficients: PointwiseCoefficients, bytes_: ArrayLike, *, launches: int = 1) -> Array:
    """Seconds of vectorized element-wise kernels.

    Args:
        coefficients: Coefficients of the device.
        bytes_: Bytes that they read and write together.
        launches: Kernels that share them.
    """
    return launches * coefficients.launch_s + _memory_s(coefficients, np.asarray(bytes_, dtype=np.float64))


def pointwise_seconds(
    coefficients: PointwiseCoefficients,
    kind: PointwiseKind,
    tokens: ArrayLike,
    width: ArrayLike,
    *,
    phase: Phase = "fwd",
    element_bytes: int = ELEMENT_BYTES,
) -> Array:
    """Seconds of one kernel; arguments broadcast.

    Only forwards are measured. A backward takes the form of its forward with its own number of streams, and
    its blocks take longer in the same proportion.

    Args:
        coefficients: Coefficients of the device.
        kind: One of :data:`POINTWISE`.
        tokens: Rows.
        width: Elements of a row, see :data:`POINTWISE`.
        phase: Forward or backward.
        element_bytes: Bytes of one element.
    """
    c = coefficients
    kernel = POINTWISE[kind]
    streams = kernel.streams if phase == "fwd" else kernel.backward_streams
    tokens_, width_ = np.asarray(tokens, dtype=np.float64), np.asarray(width, dtype=np.float64)
    bytes_ = element_bytes * streams * tokens_ * width_
    cached = _cached_share(c, bytes_)
    latency_s = _latency_s(c, kind, tokens_, width_, cached) * (streams / kernel.streams)
    memory_s = _memory_s(c, bytes_)
    longer_s, shorter_s = np.maximum(latency_s, memory_s), np.minimum(latency_s, memory_s)
    # The longer one is factored out, so that no power underflows; no work has 0 / 0.
    ratio = np.divide(shorter_s, longer_s, out=np.zeros_like(longer_s), where=longer_s > 0)
    return np.asarray(c.launch_s + longer_s * (1.0 + ratio**c.overlap) ** (1.0 / c.overlap))


def _latency_s(
    c: PointwiseCoefficients, kind: PointwiseKind, tokens: Array, width: Array, cached: Array
) -> Array:
    kernel = POINTWISE[kind]
    if kind == "gather":
        return np.asarray(c.gather_start_s + tokens * width * c.gather_s)
    if kernel.threads is None:
        return np.asarray(tokens * width * (c.gelu_s if kind == "gelu" else 0.0))
    threads = np.clip(np.ceil(width / (kernel.lanes * kernel.loops)), 1.0, kernel.threads)
    waves = np.ceil(tokens / (c.sm_count * (c.threads_per_sm // threads)))
    pass_s = c.pass_s[kind] * (cached + (1.0 - cached) * c.dram_delay)
    return np.asarray(waves * (c.block_s + width / (kernel.lanes * threads) * pass_s))


def _memory_s(c: PointwiseCoefficients, bytes_: Array) -> Array:
    cached = _cached_share(c, bytes_)
    return np.asarray(bytes_ * (cached / c.l2_bytes_per_s + (1.0 - cached) / c.dram_bytes_per_s))


def _cached_share(c: PointwiseCoefficients, bytes_: Array) -> Array:
    return np.asarray(np.clip(2.0 - bytes_ / c.l2_bytes, 0.0, 1.0))
