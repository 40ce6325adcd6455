"""Fits the cheapest of a few lines ``latency + bytes / rate`` to measured times."""

from __future__ import annotations

from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares, nnls

Array = NDArray[np.float64]

MAX_LINES = 3
"""NCCL has three protocols."""
_WORTH = 0.95
"""One line more has to bring the error below this share of what it was."""
_BREAKS = 8
"""Sizes at which a start may change lines."""
_MIN_ROWS = 4
"""Rows that each line has at the start, at least."""
_LOSS_SCALE = 0.05
_SPAN = 4.0
"""Distance from the logarithms of a start that a fit may go."""
_LEAST_LATENCY_SHARE = 0.5
"""Least latency of a line, as a share of the shortest measured time: a line that starts lower would be seen
only where nothing was measured."""
_MARGIN = 1e-9
"""A start on the bound lies inside it."""


def fit_lines(bytes_: Array, seconds: Array, *, least_s_per_byte: float = 1e-15) -> Array:
    """Lines that fit best in relative terms, every octave of sizes counting the same.

    Args:
        bytes_: [R], sizes of R rows.
        seconds: [R], above 0.
        least_s_per_byte: No line has a higher rate than that.

    Returns:
        [lines, 2], seconds and seconds per byte; later lines start slower and have the higher rate.
    """
    octave = np.floor(np.log2(bytes_)).astype(int)
    weight = 1 / np.sqrt(np.bincount(octave)[octave])

    def refined(start: Array) -> tuple[Array, float]:
        start = np.maximum(start, [_LEAST_LATENCY_SHARE * seconds.min(), least_s_per_byte])
        return _refined(start, bytes_, seconds, weight, least_s_per_byte)

    best, best_error = refined(_one_line(bytes_, seconds, weight)[None])
    for count in range(2, MAX_LINES + 1):
        fits = [refined(start) for start in _starts(count, bytes_, seconds, weight)]
        lines, error = min(fits, key=lambda fit: fit[1], default=(best, np.inf))
        if error > _WORTH * best_error:
            break
        best, best_error = lines, error
    return _without_idle_lines(best, bytes_)


def line_seconds(lines: Array, bytes_: Array) -> Array:
    """[R], the cheapest line at each size."""
    return np.asarray((lines[:, :1] + lines[:, 1:] * bytes_).min(axis=0))


def _one_line(bytes_: Array, seconds: Array, weight: Array) -> Array:
    """Relative least squares, neither coefficient negative."""
    terms = np.stack([np.ones_like(bytes_), bytes_], axis=1) * (weight / seconds)[:, None]
    scale = terms.max(axis=0)
    solution = nnls(terms / scale, weight)[0] / scale
    return np.asarray(np.maximum(solution, seconds.min() / bytes_.max() / 10))


def _starts(count: int, bytes_: Array, seconds: Array, weight: Array) -> list[Array]:
    """A line through each part of the sizes, for each way to cut them into that many parts."""
    edges = np.exp(np.linspace(np.log(bytes_.min()), np.log(bytes_.max()), _BREAKS + 2))[1:-1]
    starts: list[Array] = []
    for cuts in combinations(edges, count - 1):
        part = np.searchsorted(cuts, bytes_)
        if np.bincount(part, minlength=count).min() >= _MIN_ROWS:
            rows = [part == i for i in range(count)]
            starts.append(np.stack([_one_line(bytes_[r], seconds[r], weight[r]) for r in rows]))
    return starts


def _refined(
    start: Array, bytes_: Array, seconds: Array, weight: Array, least_s_per_byte: float
) -> tuple[Array, float]:
    """All lines together from a start, and the weighted mean error."""

    def log_ratio(x: Array) -> Array:
        return np.asarray(np.log(line_seconds(np.exp(x.reshape(-1, 2)), bytes_) / seconds))

    log_start = np.log(start)
    lower, upper = log_start - _SPAN, log_start + _SPAN
    lower[:, 0] = np.maximum(lower[:, 0], np.log(_LEAST_LATENCY_SHARE * seconds.min()) - _MARGIN)
    lower[:, 1] = np.maximum(lower[:, 1], np.log(least_s_per_byte) - _MARGIN)

    def residuals(x: Array) -> Array:
        return np.asarray(weight * log_ratio(x))

    fit = least_squares(
        residuals,
        log_start.ravel(),
        bounds=(lower.ravel(), upper.ravel()),
        loss="soft_l1",
        f_scale=_LOSS_SCALE,
    )
    error = float(np.average(np.abs(np.expm1(log_ratio(fit.x))), weights=weight**2))
    lines = np.exp(fit.x.reshape(-1, 2))
    return lines[np.argsort(lines[:, 0])], error


def _without_idle_lines(lines: Array, bytes_: Array) -> Array:
    """Only lines that are the cheapest at some measured size."""
    chosen = (lines[:, :1] + lines[:, 1:] * bytes_).argmin(axis=0)
    return np.asarray(lines[np.unique(chosen)])
