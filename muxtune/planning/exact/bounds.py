"""Iteration times that no schedule of some hTasks is faster than.

With ``w`` seconds of a micro-batch of hTask ``H`` on stage ``s``, forward and backward, ``m`` micro-batches,
``x`` seconds of a transfer, and ``way(s)`` what a micro-batch spends before stage ``s`` and behind it on the
way back, transfers included:

load      sum over H of m w                                     a stage does one action at a time
window    sum over H of m (w + what lies behind s) / (pp - s)   at most pp - s micro-batches are open; with
                                                                carry groups of up to g, pp - s - 1 + g
chain     way(s) + m w                                          H's step ends before its next one starts
drain     least way(s) there and least back of all H + load     under flush

They hold where every action is a clock of its own. With estimated seconds they are estimates, and with exact
ones bounds (tested); both order and prune the search.
"""

# Shapes, in names in lower case: S stages, H hTasks

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from muxtune.planning.exact.seconds import HTaskTimes
from muxtune.schedule import Template

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class IterationBounds:
    """Seconds of an iteration, at least."""

    load_s: float
    continuous_s: float
    flush_s: float

    def of(self, templates: Sequence[Template]) -> float:
        """Bound for the best of some templates."""
        return min(self.continuous_s if each == "continuous" else self.flush_s for each in templates)


def iteration_bounds(
    work_s_sh: Floats, microbatches_h: Floats, p2p_s_h: Floats, run: int = 1
) -> IterationBounds:
    """Bounds of a partition.

    Args:
        work_s_sh: Seconds of a micro-batch's forward and backward on each stage.
        microbatches_h: Micro-batches per iteration.
        p2p_s_h: Seconds of a transfer.
        run: Micro-batches of the longest carry group.
    """
    stages = np.arange(len(work_s_sh))[:, None]
    through = np.cumsum(work_s_sh, axis=0)
    before_s = through - work_s_sh + 2 * stages * p2p_s_h
    behind_s = through[-1] - through + 2 * (len(work_s_sh) - 1 - stages) * p2p_s_h
    load_s_sh = microbatches_h * work_s_sh
    load_s = load_s_sh.sum(axis=1)
    window_s = (microbatches_h * (work_s_sh + behind_s)).sum(axis=1) / (
        len(work_s_sh) - 1 - stages[:, 0] + run
    )
    chain_s = (before_s + load_s_sh).max()
    steady_s = float(max(load_s.max(), window_s.max(), chain_s))
    drained_s = float((before_s.min(axis=1) + load_s).max())
    return IterationBounds(float(load_s.max()), steady_s, max(steady_s, drained_s))


def exact_bounds(times: Sequence[HTaskTimes], microbatches: Sequence[int], run: int = 1) -> IterationBounds:
    """Bounds of priced hTasks, whose longest carry group has ``run`` micro-batches.

    One hTask may be first on the way there and another last on the way back, so the drain takes the least of
    each way; :func:`iteration_bounds` knows only both ways together, and is an estimate there.
    """
    fwd_s, bwd_s = (np.array([getattr(each, name) for each in times]).T for name in ("fwd_s", "bwd_s"))
    p2p_s = np.array([each.p2p_s for each in times])
    m = np.array(microbatches, dtype=np.float64)
    bounds = iteration_bounds(fwd_s + bwd_s, m, p2p_s, run)
    hops_s = np.arange(len(fwd_s))[:, None] * p2p_s
    ways_s = [(np.cumsum(each, axis=0) - each + hops_s).min(axis=1) for each in (fwd_s, bwd_s)]
    drained_s = float((ways_s[0] + (m * (fwd_s + bwd_s)).sum(axis=1) + ways_s[1]).max())
    return replace(bounds, flush_s=max(bounds.continuous_s, drained_s))
