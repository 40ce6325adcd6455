"""Partitions into contiguous groups, by dynamic programming over bands.

Bands are those of :mod:`muxtune.planning.estimate.stream_tokens`. By number of groups, as in
:func:`cheapest_cuts`:

    F(i, n) = min over j of F(j, n - 1) + cost(tasks j to i - 1)

By pace. A pipeline goes at the pace of its longest micro-batches: while one is on its way, the stages behind
it have at most as many others as may be open, and wait for it if those are shorter. So for each of some paces
``p`` no micro-batch may take longer, and what is shorter is charged for some or all of the rest:

    F(i) = min over j of F(j) + m ((1 - c) t + c p)     where t <= p
"""

# Shapes, in names in lower case: n tasks, W widest group, P paces

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

Groups = tuple[int, ...]
"""A partition: the masks of its groups, ascending."""


Floats = NDArray[np.float64]
Places = tuple[NDArray[np.intp], NDArray[np.intp]]
"""Where in a band the groups of a partition stand: their ends, and their widths less one; in order."""


@dataclass(frozen=True)
class CheapestCuts:
    """Partitions by number of groups."""

    total: Floats
    """``[counts + 1]``: cost of the cheapest partition into so many groups, inf where there is none."""
    _taken: NDArray[np.intp]
    """``[counts + 1, n]``: width, less one, of the last group of the first tasks, in so many groups."""

    def places(self, groups: int) -> Places:
        """Groups of the cheapest partition into so many."""
        ends: list[int] = []
        widths: list[int] = []
        end = self._taken.shape[1] - 1
        for count in range(groups, 0, -1):
            w = int(self._taken[count, end])
            ends.append(end)
            widths.append(w)
            end -= w + 1
        return np.array(ends[::-1]), np.array(widths[::-1])


def cheapest_cuts(cost_nw: Floats, most_groups: int, give_up: float = np.inf) -> CheapestCuts:
    """Solve for all numbers of groups up to ``most_groups``.

    Args:
        cost_nw: Cost of each group; inf for those that may not be.
        most_groups: Partitions into more are not looked for.
        give_up: Stop when the best partition costs more than this many times the best so far.
    """
    n, width = cost_nw.shape
    least = np.full(width - 1 + n + 1, np.inf)  # front: before the first task
    least[width - 1] = 0.0
    taken = [np.zeros(n, dtype=np.intp)]
    total = [np.inf]
    ends = np.arange(n)
    lowest = np.inf
    for _ in range(most_groups):
        narrowest_first = sliding_window_view(least, width)[:n, ::-1]
        costs = narrowest_first + cost_nw
        taken.append(costs.argmin(axis=1))
        least = np.full_like(least, np.inf)
        least[width:] = costs[ends, taken[-1]]
        total.append(float(least[-1]))
        lowest = min(lowest, total[-1])
        if np.isfinite(lowest) and total[-1] > give_up * lowest:
            break
    return CheapestCuts(np.array(total), np.array(taken))


def paced_cuts(
    slot_s_nw: Floats, microbatches_nw: Floats, pace_s_p: Floats, charged_p: Floats
) -> list[Places]:
    """Cheapest partition for every pace that allows one, without repetitions.

    Args:
        slot_s_nw: Seconds of a micro-batch on the slowest stage; inf for groups that may not be.
        microbatches_nw: Micro-batches of each group.
        pace_s_p: Seconds that a micro-batch takes at most, for each pace.
        charged_p: Share of the difference to the pace that a shorter micro-batch is charged, for each pace; 0
            to 1.
    """
    n, width = slot_s_nw.shape
    pace, charged = pace_s_p[:, None], charged_p[:, None]
    least = np.full((len(pace_s_p), width - 1 + n + 1), np.inf)  # front: before the first task
    least[:, width - 1] = 0.0
    taken = np.zeros((len(pace_s_p), n), dtype=np.intp)
    rows = np.arange(len(pace_s_p))
    for end in range(n):
        slot_s = slot_s_nw[end]
        widest = width - int(np.argmax(np.isfinite(slot_s)[::-1]))  # few groups have room
        slot_s = slot_s[:widest]
        cost_s = microbatches_nw[end, :widest] * (slot_s + charged * np.maximum(pace - slot_s, 0.0))
        before = least[:, end + width - widest : end + width][:, ::-1]
        total = np.where(slot_s <= pace, before + cost_s, np.inf)
        taken[:, end] = total.argmin(axis=1)
        least[:, end + width] = total[rows, taken[:, end]]
    found: dict[bytes, Places] = {}
    for row in np.flatnonzero(np.isfinite(least[:, -1])):
        ends: list[int] = []
        end = n - 1
        while end >= 0:
            ends.append(end)
            end -= int(taken[row, end]) + 1
        places = np.array(ends[::-1]), taken[row, ends[::-1]]
        found[places[0].tobytes()] = places
    return list(found.values())


def set_partitions(count: int) -> Iterator[Groups]:
    """All partitions of ``count`` tasks, as ascending masks.

    Task by task: into each group there is, or into a new one, so each partition comes once.
    """

    def extend(groups: list[int], task: int) -> Iterator[Groups]:
        if task == count:
            yield tuple(sorted(groups))
            return
        bit = 1 << task
        for position in range(len(groups)):
            groups[position] |= bit
            yield from extend(groups, task + 1)
            groups[position] ^= bit
        groups.append(bit)
        yield from extend(groups, task + 1)
        groups.pop()

    return extend([], 0)
