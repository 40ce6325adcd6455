"""Interpolation of measured ratios over logarithmic axes that need not form a full grid."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping


class RatioTable:
    """Logarithm of measured / analytic over one or more dimensions, multilinear in their logarithms.

    Axes are nested: every value of the first dimension has its own axis of the next, so long sequences may
    be measured in smaller numbers than short ones.

    Args:
        points: Log ratio under the dimensions, which are above 0 and equally many everywhere.
    """

    def __init__(self, points: Mapping[tuple[float, ...], float]) -> None:
        self._root = _Axis(points)

    def at(self, dims: tuple[float, ...]) -> tuple[float, float]:
        """Log ratio at ``dims``, and how far outside they lie.

        Outside, the ratio of the nearest edge is returned.

        Returns:
            The log ratio, and the largest logarithmic distance to an axis that had to be left (0 inside).
        """
        return self._root.at([math.log(size) for size in dims])


class _Axis:
    def __init__(self, points: Mapping[tuple[float, ...], float]) -> None:
        sizes = sorted({dims[0] for dims in points})
        self._positions = [math.log(size) for size in sizes]
        self._children: list[_Axis | float] = []
        for size in sizes:
            inner = {dims[1:]: value for dims, value in points.items() if dims[0] == size}
            self._children.append(inner[()] if () in inner else _Axis(inner))

    def at(self, position: list[float]) -> tuple[float, float]:
        x, rest = position[0], position[1:]
        last = len(self._positions) - 1
        if x <= self._positions[0]:
            return self._clamped(0, self._positions[0] - x, rest)
        if x >= self._positions[last]:
            return self._clamped(last, x - self._positions[last], rest)
        right = bisect_right(self._positions, x)
        left = right - 1
        weight = (x - self._positions[left]) / (self._positions[right] - self._positions[left])
        low, low_outside = self._child(left, rest)
        if weight == 0.0:
            return low, low_outside
        high, high_outside = self._child(right, rest)
        return low + weight * (high - low), max(low_outside, high_outside)

    def _clamped(self, index: int, distance: float, rest: list[float]) -> tuple[float, float]:
        value, outside = self._child(index, rest)
        return value, max(distance, outside)

    def _child(self, index: int, rest: list[float]) -> tuple[float, float]:
        child = self._children[index]
        return child.at(rest) if isinstance(child, _Axis) else (child, 0.0)
