"""Prices at many sizes at once, out of a few: what a search ranks by.

A cost model prices one operator at a time. A search needs the same operators at thousands of sizes, so each
is priced on a grid of sizes, which is dense in proportion, and read off straight lines between them. Frozen
products are most of the time and go up in steps (tiles, waves), so they are priced at every size asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_FINE_TOKENS = 8
_SHARE = 128
"""Steps of powers of two: no stream below 16384 is moved over the edge of a tile of 128 rows."""


@dataclass(frozen=True)
class Curve:
    """Seconds by size, piecewise linear; 0 at size 0."""

    sizes: Floats
    seconds: Floats

    def __call__(self, sizes: Floats) -> Floats:
        """Seconds at these sizes; beyond the last one in proportion to the size."""
        within = np.interp(sizes, self.sizes, self.seconds)
        return np.asarray(within * np.maximum(sizes / self.sizes[-1], 1.0))


def sample_curve(seconds_of: Callable[[int], float], largest: float, points: int) -> Curve:
    """Price whole sizes from 1 to ``largest``."""
    sizes = np.unique(np.geomspace(1, max(np.ceil(largest), 1), points).round().astype(int))
    seconds = [seconds_of(int(size)) for size in sizes]
    return Curve(np.array([0.0, *sizes]), np.array([0.0, *seconds]))


def round_tokens(tokens: Ints) -> Ints:
    """Stream lengths up to the next multiple of 8, or of about a 128th of themselves."""
    octave = np.floor(np.log2(np.maximum(tokens, 1))).astype(np.int64)
    step = np.maximum(_FINE_TOKENS, (1 << octave) // _SHARE)
    return np.asarray(-(-tokens // step) * step)
