"""Iteration times that no schedule of some hTasks is faster than.

``f`` and ``b`` are the seconds of a micro-batch of hTask ``H`` on stage ``s``, and ``m`` is the number of its
micro-batches; ``head(s)`` is the time from the start of a forward on stage 0 to its arrival on stage ``s``,
``tail(s)`` that of a backward on its way back, and ``trip(s)`` the way of a micro-batch from stage ``s`` to
the last one and back, transfers included.

load      sum over H of m (f + b)                  a stage does one action at a time
window    sum over H of m trip(s) / (pp - s)       at most pp - s micro-batches are open; with carry groups of
                                                   up to g, pp - s - 1 + g
chain     head(s) + m (f + b) + tail(s)            H's step ends before its next one starts
drain     least head(s) + load + least tail(s)     under flush; one H may be first there, another last back

They hold where every action is a clock of its own. With estimated seconds they are estimates, and with exact
ones bounds (tested); both order and prune the search.
"""

# Shapes, in names in lower case: S stages, H hTasks

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True)
class BoundTerms:
    """What hTasks, or groups that may become some, add to the bounds: ``[S, H]`` seconds of an iteration."""

    load_s: Floats
    trip_s: Floats
    """Ways of all micro-batches of an iteration."""
    head_s: Floats
    tail_s: Floats

    @property
    def chain_s(self) -> Floats:
        """``[H]``: what an hTask takes by itself."""
        return np.asarray((self.head_s + self.load_s + self.tail_s).max(axis=0))

    def window_s(self, run: int) -> Floats:
        """``[S, H]``: ways over the number of micro-batches that a stage may have open.

        Args:
            run: Micro-batches of the longest carry group.
        """
        open_s = np.arange(len(self.trip_s))[::-1] + run
        return np.asarray(self.trip_s / open_s[:, None])

    def together(self, run: int = 1) -> IterationBounds:
        """Bounds of a partition into all these hTasks; ``run`` as in :meth:`window_s`."""
        load_s = self.load_s.sum(axis=1)
        window_s = self.window_s(run).sum(axis=1)
        steady_s = float(max(load_s.max(), window_s.max(), self.chain_s.max()))
        drained_s = float((self.head_s.min(axis=1) + load_s + self.tail_s.min(axis=1)).max())
        return IterationBounds(float(load_s.max()), steady_s, max(steady_s, drained_s))

    @staticmethod
    def joined(terms: Sequence[BoundTerms]) -> BoundTerms:
        """Terms of all hTasks of some."""
        return BoundTerms(
            *(
                np.concatenate([getattr(each, name) for each in terms], axis=1)
                for name in ("load_s", "trip_s", "head_s", "tail_s")
            )
        )


def bound_terms(fwd_s_sh: Floats, bwd_s_sh: Floats, microbatches_h: Floats, p2p_s_h: Floats) -> BoundTerms:
    """Terms of some hTasks.

    Args:
        fwd_s_sh: Seconds of a micro-batch's forward on each stage.
        bwd_s_sh: Seconds of its backward. Where only the sum of both is known, half of it may stand for each.
        microbatches_h: Micro-batches per iteration.
        p2p_s_h: Seconds of a transfer.
    """
    stages = np.arange(len(fwd_s_sh))[:, None]
    hops_s = stages * p2p_s_h
    head_s = np.cumsum(fwd_s_sh, axis=0) - fwd_s_sh + hops_s
    tail_s = head_s if bwd_s_sh is fwd_s_sh else np.cumsum(bwd_s_sh, axis=0) - bwd_s_sh + hops_s
    work_s = fwd_s_sh + bwd_s_sh
    behind_s = head_s[-1] - head_s + tail_s[-1] - tail_s + work_s[-1]  # from the stage's own work on
    return BoundTerms(microbatches_h * work_s, microbatches_h * behind_s, head_s, tail_s)


@dataclass(frozen=True, slots=True)
class PartitionBounds:
    """:class:`IterationBounds` of many partitions, ``[P]`` each."""

    load_s: Floats
    continuous_s: Floats
    flush_s: Floats

    def of(self, templates: Sequence[Template]) -> Floats:
        """Bounds for the best of some templates."""
        each = [self.continuous_s if name == "continuous" else self.flush_s for name in templates]
        return np.asarray(np.min(each, axis=0))


def partition_bounds(
    work_s_sph: Floats,
    microbatches_ph: Floats,
    p2p_s_ph: Floats,
    runs_p: NDArray[np.int64],
    inside_ph: NDArray[np.bool_],
) -> PartitionBounds:
    """Bounds of many partitions at once, as :func:`bound_terms` and :meth:`BoundTerms.together` say of one.

    Half of the work stands for the forward, and half for the backward.

    Args:
        work_s_sph: Seconds of a micro-batch on each stage, forward and backward.
        microbatches_ph: Micro-batches per iteration; 0 where there is no hTask.
        p2p_s_ph: Seconds of a transfer.
        runs_p: Micro-batches of the longest carry group.
        inside_ph: Whether there is an hTask.
    """
    pp = len(work_s_sph)
    half_s = 0.5 * work_s_sph
    head_s = np.cumsum(half_s, axis=0) - half_s
    head_s += np.arange(pp)[:, None, None] * p2p_s_ph
    load_s_sph = microbatches_ph * work_s_sph
    load_s_sp = load_s_sph.sum(axis=2)
    trip_s_sp = (microbatches_ph * (2 * (head_s[-1] - head_s) + work_s_sph[-1])).sum(axis=2)
    open_sp = np.arange(pp)[::-1, None] + runs_p
    chain_s_p = np.where(inside_ph, 2 * head_s + load_s_sph, 0.0).max(axis=(0, 2))
    load_s_p = load_s_sp.max(axis=0)
    steady_s_p = np.maximum(np.maximum(load_s_p, (trip_s_sp / open_sp).max(axis=0)), chain_s_p)
    least_head_s_sp = np.where(inside_ph, head_s, np.inf).min(axis=2)
    drained_s_p = (2 * least_head_s_sp + load_s_sp).max(axis=0)
    return PartitionBounds(load_s_p, steady_s_p, np.maximum(steady_s_p, drained_s_p))


def exact_bounds(times: Sequence[HTaskTimes], microbatches: Sequence[int], run: int = 1) -> IterationBounds:
    """Bounds of priced hTasks, whose longest carry group has ``run`` micro-batches."""
    return exact_terms(times, microbatches).together(run)


def exact_terms(times: Sequence[HTaskTimes], microbatches: Sequence[int]) -> BoundTerms:
    """Terms of priced hTasks."""
    fwd_s, bwd_s = (np.array([getattr(each, name) for each in times]).T for name in ("fwd_s", "bwd_s"))
    p2p_s = np.array([each.p2p_s for each in times])
    return bound_terms(fwd_s, bwd_s, np.array(microbatches, dtype=np.float64), p2p_s)
