"""A GPU with shipped coefficients: its models of products, of other kernels and of attention side by side."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from muxtune.costs.attention import AttentionKernel, Heads, Rate, attention_seconds
from muxtune.costs.devices import device_names, load_part
from muxtune.costs.gemm import GemmCoefficients, gemm_seconds, load_gemm
from muxtune.costs.pointwise import (
    PointwiseCoefficients,
    PointwiseKind,
    load_pointwise,
    pointwise_seconds,
    stream_seconds,
)
from muxtune.graph.operators import Phase
from muxtune.support.errors import unknown_name

_STRICT = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Peaks(NamedTuple):
    """Dense data-sheet rates."""

    tensor_flops_per_s: float
    """16-bit products with sums in float32."""
    float32_flops_per_s: float
    """Outside of the tensor cores."""


class _PeaksFile(BaseModel):
    model_config = _STRICT

    source: str
    tensor_flops_per_s: float = Field(gt=0)
    float32_flops_per_s: float = Field(gt=0)


class _RateFile(BaseModel):
    model_config = _STRICT

    flops_per_s: float = Field(gt=0)
    start_tiles: float = Field(ge=0)


class _AttentionFile(BaseModel):
    model_config = _STRICT

    source: str
    forward: dict[int, _RateFile] = Field(min_length=1)
    backward: dict[int, _RateFile] = Field(min_length=1)


class DeviceFile(BaseModel):
    """What ``device.json`` has: data-sheet peaks, and rates of attention by head width."""

    model_config = _STRICT

    peaks: _PeaksFile
    attention: _AttentionFile


@lru_cache(maxsize=16)
def device_peaks(device: str) -> Peaks:
    """Data-sheet rates of a device.

    Raises:
        UserError: No such device.
    """
    peaks = load_part(device, "device", DeviceFile).peaks
    return Peaks(peaks.tensor_flops_per_s, peaks.float32_flops_per_s)


@lru_cache(maxsize=16)
def attention_kernel(device: str) -> AttentionKernel:
    """Kernel of a device.

    Raises:
        UserError: No such device.
    """
    rates = load_part(device, "device", DeviceFile).attention
    forward, backward = (
        {width: Rate(rate.flops_per_s, rate.start_tiles) for width, rate in side.items()}
        for side in (rates.forward, rates.backward)
    )
    return AttentionKernel(forward, backward)


def peak_flops_per_s(device: str, dtype: str) -> float | None:
    """Data-sheet rate of a device in a dtype; None where no data sheet says it.

    A CPU's depends on clocks and vector units that nobody wrote down.
    """
    if device not in device_names():
        return None
    peaks = device_peaks(device)
    rates = {"bfloat16": peaks.tensor_flops_per_s, "float32": peaks.float32_flops_per_s}
    return rates.get(dtype)


FLOAT32_EFFICIENCY = 0.85
"""Share of the peak that float32 products with float32 precision, torch's default, reach. An assumption: only
16-bit products are measured, and those reach 70 to 80 % of a peak that is much harder to feed."""

_FLOAT32_BYTES = 4
_HALF_BYTES = 2


@dataclass(frozen=True)
class Gpu:
    """A device. Seconds are scalars here; the models behind are vectorized."""

    name: str
    gemm: GemmCoefficients
    pointwise: PointwiseCoefficients
    attention: AttentionKernel
    peaks: Peaks

    @property
    def launch_s(self) -> float:
        """Seconds of a kernel that does next to nothing, on the device."""
        return self.pointwise.launch_s

    @property
    def digest(self) -> str:
        """SHA-256 of everything that prices depend on."""
        fitted = (self.gemm.model_dump_json(), self.pointwise.model_dump_json())
        return hashlib.sha256(repr((fitted, self.attention, self.peaks)).encode()).hexdigest()

    def product_s(self, m: float, n: float, k: float, *, element_bytes: int = _HALF_BYTES) -> float:
        """Seconds of ``y[m, n] = x[m, k] W[k, n]``.

        In float32 a product is as long as its arithmetic without tensor cores, or as the 16-bit product and
        its further bytes, whichever takes longer.
        """
        half_s = float(gemm_seconds(self.gemm, m, n, k))
        if element_bytes == _HALF_BYTES:
            return half_s
        more_bytes = (element_bytes - _HALF_BYTES) * (m * k + k * n + m * n)
        arithmetic_s = 2.0 * m * n * k / (FLOAT32_EFFICIENCY * self.peaks.float32_flops_per_s)
        return max(half_s + self.stream_s(more_bytes, launches=0), arithmetic_s + self.launch_s)

    def stream_s(self, bytes_: float, *, launches: int = 1) -> float:
        """Seconds of vectorized element-wise kernels, see :func:`muxtune.costs.pointwise.stream_seconds`."""
        return float(stream_seconds(self.pointwise, bytes_, launches=launches))

    def pointwise_s(
        self, kind: PointwiseKind, tokens: int, width: int, phase: Phase, *, element_bytes: int = _HALF_BYTES
    ) -> float:
        """Seconds of one kernel, see :func:`muxtune.costs.pointwise.pointwise_seconds`."""
        seconds = pointwise_seconds(
            self.pointwise, kind, tokens, width, phase=phase, element_bytes=element_bytes
        )
        return float(seconds)

    def attention_s(
        self,
        heads: Heads,
        sequences: float,
        queries: int,
        phase: Phase,
        *,
        keys: int | None = None,
        element_bytes: int = _HALF_BYTES,
    ) -> float:
        """Seconds of causal attention of equally long sequences; the queries are the last of their keys.

        FlashAttention has no float32. There the memory-efficient kernels of torch take over; their products
        are slower by the ratio of the peaks.
        """
        seconds = float(
            attention_seconds(self.attention, self.pointwise, heads, sequences, queries, keys, phase=phase)
        )
        if element_bytes == _HALF_BYTES:
            return seconds
        return seconds * self.peaks.tensor_flops_per_s / self.peaks.float32_flops_per_s


@lru_cache(maxsize=16)
def load_gpu(device: str) -> Gpu:
    """A device whose coefficients ship with the project.

    Raises:
        UserError: No such device.
    """
    if device not in device_names():
        raise unknown_name("device with coefficients", device, device_names())
    return Gpu(
        device, load_gemm(device), load_pointwise(device), attention_kernel(device), device_peaks(device)
    )
