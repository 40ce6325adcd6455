"""What the busiest replica has of a step's sequences, estimated for all groups of tasks at once.

Replicas wait for the slowest (:mod:`muxtune.planning.exact.slowest_replica`), so a group is estimated by the
replica that has most. Under ``pad`` it is the first one, as sequences keep their order. Elsewhere they are
dealt longest first, and of the ``k`` longest of a group some replica has ``k / dp``, rounded up: the one with
the longest sequence has a whole one of them, however many replicas there are.
"""

# Shapes, in names in lower case: n tasks, W widest group; bands [n, W] as in
# muxtune.planning.estimate.stream_tokens

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from muxtune.batches import Alignment
from muxtune.planning.estimate.curves import Floats, Ints
from muxtune.planning.estimate.stream_tokens import Batches, padded_rows


class LengthClass(NamedTuple):
    """Near-equal sequences, which share calls of attention."""

    slots: int
    """Slots of a row."""
    front: int
    """Keys in front of each."""
    sequences: Floats
    """How many there are in a step, of each task or of each group."""


class BusiestReplica:
    """Sequences of the busiest of ``dp`` replicas, mean over the steps; of one replica all of them.

    Args:
        batches: Sequence lengths of the tasks.
        classes: Near-equal sequences, longest first.
        sum_tasks: Adds up the tasks of every group.
        microbatches_nw: Micro-batches of every group on each replica.
        dp: Replicas.
    """

    def __init__(
        self,
        batches: Batches,
        classes: Sequence[LengthClass],
        sum_tasks: Callable[[Floats], Floats],
        microbatches_nw: Ints,
        dp: int,
    ) -> None:
        self._batches = batches
        self._sum = sum_tasks
        self._microbatches_nw = microbatches_nw
        self._dp = dp
        self.classes: list[LengthClass] = []
        """How many such sequences of a step the busiest replica has of every group."""
        longer = np.zeros(microbatches_nw.shape)
        dealt = np.zeros(microbatches_nw.shape)
        tokens, busiest_tokens = np.zeros(dealt.shape), np.zeros(dealt.shape)
        for slots, front, sequences_n in classes:
            count = sum_tasks(sequences_n)
            longer = longer + count
            own = most_of(longer, dp) - dealt
            self.classes.append(LengthClass(slots, front, own))
            dealt = dealt + own
            tokens += slots * count
            busiest_tokens += slots * own
        self._share = busiest_tokens / np.maximum(tokens, 1e-9) if dp > 1 else np.ones(dealt.shape)

    def share(self, alignment: Alignment) -> Floats:
        """Share of a step's tokens, and so of its targets, that the busiest replica has, ``[n, W]``."""
        if alignment != "pad" or self._dp == 1:
            return self._share
        share = np.ones(self._microbatches_nw.shape)
        sizes = self._sum(self._batches.sizes_n.astype(np.float64))
        for m in np.unique(self._microbatches_nw):
            first = padded_rows(self._batches, int(m) * self._dp)[:, : int(m)].sum(axis=1)
            at = self._microbatches_nw == m
            share[at] = (self._sum(first.astype(np.float64)) / np.maximum(sizes, 1e-9))[at]
        return share


def most_of(counts: Floats, dp: int) -> Floats:
    """Sequences of the fullest of ``dp`` replicas that so many are dealt to; linear in between.

    Counts are means over steps, so they may have fractions.
    """
    below = np.floor(counts)
    at_least, at_most = np.ceil(below / dp), np.ceil((below + 1) / dp)
    return np.asarray(at_least + (counts - below) * (at_most - at_least))
