"""Matrix products that were measured, and others by the residuals of the analytic model at similar ones.

Which kernel a library takes, and how far it is from the modelled time, depends less on the shape than on how
the candidate kernels compare at it. So two shapes are similar when their sizes are, and when every tile is
about equally far from the best one and fills its waves equally well. The logarithm of measured / analytic is
a Gaussian process over these features, around its median (Nystroem's approximation on a random selection of
the measurements).

A second, smooth process is added among down projections of gated MLPs. From 1024 tokens on they were
measured faster, relative to the model, than a layer's other products: by 6 to 7 % on an H100, by 0 to 5 % on
an A100, by 1 to 2 % on an A40. A table does not tell why: their inputs, products of activations, may be so
near zero that they draw less power, or their k, which has few factors of two, may spread better over the
caches. (Factors of two alone, as a coefficient of the model, predicted phi-2 worse.) The op is no part of a
shape, but n and k betray it: :func:`_is_down_projection`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from muxtune.costs.gemm import (
    Floats,
    GemmCoefficients,
    candidate_kernels,
    expected_seconds,
    on_distinct_shapes,
)
from muxtune.costs.profiled import ExtrapolationWarning

_EitherFloats = NDArray[np.floating[Any]]
"""Array of double or single precision."""

# S shapes, R measured shapes, P of them as support points, F features

_SUPPORT = 2000
_NOISE = 0.3
"""Variance of a measurement around the process, relative to the process itself."""
_SIZE_SCALES = np.array([1.0, 0.7, 0.15])
"""Scales of the binary logarithms of m, n and k. Wave quantization changes fastest with m, hardly with k."""
_TILE_SCALE = 4.0
"""Scale of how much slower a tile is than the best one, as a logarithm of time, ..."""
_TILE_CLIP = 0.6
"""... up to this: the library does not take tiles that are still slower, whatever they are."""
_WAVE_SCALE = 3.0
"""Scale of the features that say how full the waves of each tile's blocks are; they shrink where waves are
many."""
_DOWN_WEIGHT = 0.3
"""Variance of what down projections share, relative to the process of all."""
_DOWN_SCALES = np.array([0.3, 0.15, 0.15])
"""Scales of the binary logarithms of m, n and k for what down projections share, which changes slowly."""
_RESIDUAL_CLIP = 0.5
"""Largest residual, as a logarithm of time: one kernel that is badly chosen says nothing about its
neighbours."""
_SKEW = 0.01
"""Relative errors punish too long a time more than too short a one: the best guess lies below the mean
logarithm by the variance of what is left, here that on models left out (a tenth, squared)."""
_OUTSIDE = math.log(4)
"""Logarithmic distance in n or k, or beyond the range of m, at which the measurements say little."""


class MeasuredGemm:
    """Measured table on top of the analytic model.

    Shapes of the table cost what was measured (the median over equal shapes). Far outside, where the process
    falls back to the analytic model times the median ratio, an :class:`ExtrapolationWarning` says once how
    far.

    Args:
        table: Columns ``m``, ``n``, ``k`` and ``median_ms`` of one device.
        coefficients: Coefficients of that device.
    """

    def __init__(self, table: Mapping[str, ArrayLike], coefficients: GemmCoefficients) -> None:
        self._coefficients = coefficients
        rows = np.stack([np.asarray(table[name], dtype=np.float64) for name in ("m", "n", "k", "median_ms")])
        self._shapes, measured_s = _median_per_shape(rows)
        self._measured_s = dict(zip(map(tuple, self._shapes.tolist()), measured_s.tolist(), strict=True))
        self._log_sizes = np.log(self._shapes)
        self._warned = False

        features, analytic_s = self._describe(self._shapes)
        self._center = features.mean(axis=0)
        features -= self._center
        ratio = np.log(measured_s / analytic_s)
        self._offset = float(np.median(ratio))
        residual = np.clip(ratio - self._offset, -_RESIDUAL_CLIP, _RESIDUAL_CLIP)
        support = np.random.default_rng(0).permutation(len(features))[:_SUPPORT]
        self._support: _EitherFloats = features[support]
        self._support_shapes = self._shapes[support]
        across = self._covariance(features, self._shapes)
        among = across[support]
        normal = across.T @ across + _NOISE * among + 1e-6 * np.eye(len(support))
        self._weights: _EitherFloats = np.linalg.solve(normal, across.T @ residual)
        # Prices in single precision (of centered features) differ by 1e-5 and take less time.
        self._support, self._weights = (x.astype(np.float32) for x in (self._support, self._weights))

    def seconds(self, m: ArrayLike, n: ArrayLike, k: ArrayLike) -> Floats:
        """Seconds of ``y[m, n] = x[m, k] W[k, n]``, elementwise over broadcast arrays.

        Raises:
            SpecError: A dimension is not positive.
        """
        return on_distinct_shapes(self._price, m, n, k)

    def _price(self, shapes: Floats) -> Floats:
        features, analytic_s = self._describe(shapes)
        centered = (features - self._center).astype(np.float32)
        residual = self._covariance(centered, shapes) @ self._weights
        seconds = analytic_s * np.exp(self._offset + residual - _SKEW)
        known = [self._measured_s.get(tuple(shape)) for shape in shapes.tolist()]
        if not self._warned:
            self._warn_outside(shapes[[price is None for price in known]])
        return np.array([s if price is None else price for s, price in zip(seconds, known, strict=True)])

    def _describe(self, shapes: Floats) -> tuple[Floats, Floats]:
        """Features ``[S, F]`` and analytic seconds ``[S]``."""
        c = self._coefficients
        kernels = candidate_kernels(c, *np.hsplit(shapes, 3))
        log_s = np.log(kernels.seconds)
        best = log_s.min(axis=1, keepdims=True)
        unsplit = log_s.reshape(len(shapes), len(c.tiles), len(c.splits))[:, :, 0]
        behind = np.minimum(unsplit - best, _TILE_CLIP)
        tiles = np.array(c.tiles)
        waves = (np.ceil(shapes[:, None, :2] / tiles)).prod(axis=2) / c.sm_count
        fill = waves / np.ceil(waves) ** 1.25
        features = np.hstack([np.log2(shapes) * _SIZE_SCALES, behind * _TILE_SCALE, fill * _WAVE_SCALE])
        return features, expected_seconds(kernels, c.spread)

    def _covariance(self, features: _EitherFloats, shapes: Floats) -> _EitherFloats:
        """Covariance with the support points, ``[S, P]``; ``features`` and ``shapes`` describe the same S."""
        covariance = _similarity(features, self._support)
        rows, columns = (np.flatnonzero(_is_down_projection(some)) for some in (shapes, self._support_shapes))
        if len(rows) and len(columns):
            sizes = np.log2(shapes[rows]) * _DOWN_SCALES
            support_sizes = np.log2(self._support_shapes[columns]) * _DOWN_SCALES
            covariance[np.ix_(rows, columns)] += _DOWN_WEIGHT * _similarity(sizes, support_sizes)
        return covariance

    def _warn_outside(self, shapes: Floats) -> None:
        if not len(shapes):
            return
        log_sizes = np.log(shapes)
        beyond_m = np.maximum(
            log_sizes[:, 0] - self._log_sizes[:, 0].max(), self._log_sizes[:, 0].min() - log_sizes[:, 0]
        )
        pairs = np.unique(self._log_sizes[:, 1:], axis=0)
        to_pair = np.abs(log_sizes[:, None, 1:] - pairs).max(axis=2).min(axis=1)
        outside = np.maximum(beyond_m, to_pair)
        worst = int(outside.argmax())
        if outside[worst] <= _OUTSIDE:
            return
        self._warned = True
        m, n, k = shapes[worst].astype(int).tolist()
        warnings.warn(
            f"GEMM at m={m}, n={n}, k={k} is a factor {math.exp(outside[worst]):.1f} outside what was "
            f"measured on {self._coefficients.device}; its cost is the analytic one, scaled (said once)",
            ExtrapolationWarning,
            stacklevel=5,
        )


def _median_per_shape(rows: Floats) -> tuple[Floats, Floats]:
    """Distinct shapes ``[R, 3]`` and the median of their seconds ``[R]`` (rows: m, n, k, milliseconds)."""
    ordered = rows[:, np.lexsort(rows[::-1])]  # by shape, then by time
    _, start, count = np.unique(ordered[:3], axis=1, return_index=True, return_counts=True)
    middle = (ordered[3, start + (count - 1) // 2] + ordered[3, start + count // 2]) / 2
    return ordered[:3, start].T, middle * 1e-3


def _is_down_projection(shapes: Floats) -> NDArray[np.bool_]:
    """Whether k looks like a rank's part of an MLP's width and n like a model's, ``[S]``.

    Widths of models have more factors of two than those of gated MLPs (4096 and 11008, 8192 and 28672), also
    per rank. The output projection of attention has them the other way round in k = n / ranks: k divides n.
    """
    n, k = np.ceil(shapes[:, 1:]).astype(np.int64).T
    down: NDArray[np.bool_] = ((k & -k) < (n & -n)) & (n % k != 0)
    return down


def _similarity(a: _EitherFloats, b: _EitherFloats) -> _EitherFloats:
    """Exponential kernel ``[len(a), len(b)]``: continuous, but not smooth, as residuals are."""
    values: _EitherFloats = a @ b.T
    values *= -2
    values += (a * a).sum(axis=1)[:, None]
    values += (b * b).sum(axis=1)
    np.maximum(values, 0, out=values)
    np.sqrt(values, out=values)
    np.negative(values, out=values)
    np.exp(values, out=values)
    return values
