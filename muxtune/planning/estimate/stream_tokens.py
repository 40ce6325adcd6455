"""Stream lengths of all contiguous groups of tasks at once.

A search asks for the length of every run of neighbours in the sorted order of the tasks. Asked one by one
(:meth:`muxtune.planning.problem.problem.PlanningProblem.shape`) that is a pass over the data per group; here
a group is its right neighbours plus one task, and all groups of a width are laid out together. Given the same
steps both say the same number (tested).

Groups are numbered by their end: entry ``[e, w]`` of a band is the group of ``w + 1`` tasks whose last is
``e``. Where there are fewer tasks before ``e``, an entry has no meaning.
"""

# Shapes, in names in lower case: n tasks, W widest group, S steps, G groups of a task's global batch
# (micro-batches of all replicas), R rows (a task in a step), K sequences of a row, dealt as T turns of G

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from muxtune.batches import PACKED_MULTIPLE, deal_lengths
from muxtune.tasks import TaskData

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Batches:
    """The sequences that tasks take in some steps."""

    lengths_nsk: Ints
    """Longest first; 0 where a global batch has no more sequences, or the task has finished."""
    steps_n: Ints
    """How many of the steps lie inside of each task's run; they are ascending."""
    sizes_n: Ints
    """Sequences of each global batch."""
    targets_n: NDArray[np.float64]
    """Predicted tokens of a global batch, mean over the steps."""

    @property
    def tasks(self) -> int:
        """Number of tasks."""
        return len(self.steps_n)


def sampled_steps(tasks: Sequence[TaskData], count: int) -> Ints:
    """Steps to look at: so many spread over the shortest run, and over the longest; fewer if there are."""
    ends = [data.task.steps for data in tasks]
    spread = [np.linspace(0, end - 1, min(end, count)).round() for end in (min(ends), max(ends))]
    return np.unique(np.concatenate(spread).astype(np.int64))


def load_batches(tasks: Sequence[TaskData], steps: Ints) -> Batches:
    """Sequence lengths of some steps.

    Args:
        tasks: Tasks in the order in which groups are cut.
        steps: Numbers of the steps, ascending.
    """
    widest = max(data.task.global_batch_size for data in tasks)
    lengths = np.zeros((len(tasks), len(steps), widest), dtype=np.int64)
    targets = np.zeros(len(tasks))
    inside = np.zeros(len(tasks), dtype=np.int64)
    for position, data in enumerate(tasks):
        size = data.task.global_batch_size
        own = steps[steps < data.task.steps]
        inside[position] = len(own)
        lengths[position, : len(own), :size] = data.lengths[data.step_indices(own)]
        targets[position] = data.targets[data.step_indices(own)].sum() / len(own)
    lengths[:] = -np.sort(-lengths, axis=2)
    sizes = np.array([data.task.global_batch_size for data in tasks], dtype=np.int64)
    return Batches(lengths, inside, sizes, targets)


def dealt_lengths(batches: Batches, groups: int) -> Ints:
    """Sequences as :func:`muxtune.batches.deal_sequences` deals them to pack: ``[n, S, T, G]``."""
    return deal_lengths(batches.lengths_nsk, groups)


def padded_rows(batches: Batches, groups: int) -> Ints:
    """Rows of each group under ``pad``, the same in every step: ``[n, G]``."""
    room = -(-batches.sizes_n // groups)
    return np.clip(batches.sizes_n[:, None] - np.arange(groups) * room[:, None], 0, room[:, None])


def band_max(values_n: Ints, width: int) -> Ints:
    """Largest value of every group, ``[n, W]``."""
    band = np.zeros((len(values_n), width), dtype=values_n.dtype)
    band[:, 0] = values_n
    for w in range(1, width):
        band[w:, w] = np.maximum(band[w:, w - 1], values_n[: len(values_n) - w])
    return band


def band_sum(values_n: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """Sum of the values of every group, ``[n, W]`` (and further axes of ``values_n``)."""
    ends = np.concatenate([np.zeros((1, *values_n.shape[1:])), np.cumsum(values_n, axis=0)])
    n = len(values_n)
    first = np.maximum(np.arange(n)[:, None] - np.arange(width), 0)
    return np.asarray(ends[1:, None] - ends[first])


def packed_tokens(
    sizes_nsg: Ints, steps_n: Ints, *, wanted_nw: Bools, multiple: int = PACKED_MULTIPLE
) -> Ints:
    """Stream length of every group whose sequences go into the emptiest micro-batches.

    The rule of :func:`muxtune.batches.place_groups`: task by task from the last, the largest group of
    its sequences into the emptiest micro-batch. Which micro-batch is which does not matter for the longest,
    so they are kept in order of what they hold.

    Args:
        sizes_nsg: Tokens of each task's groups.
        steps_n: Steps of each task, see :class:`Batches`; a group's stream counts while all of its tasks
            train.
        wanted_nw: Groups to lay out; a group needs all narrower ones with its end.
        multiple: Number of tokens that lengths are rounded up to a multiple of.

    Returns:
        ``[n, W]``; 0 for groups that are not wanted.
    """
    n, steps, _ = sizes_nsg.shape
    tokens = np.zeros(wanted_nw.shape, dtype=np.int64)
    # Ends with the widest groups first, so that those that still grow are the first ones.
    reach = wanted_nw.shape[1] - np.argmax(wanted_nw[:, ::-1], axis=1)
    reach[~wanted_nw.any(axis=1)] = 0
    ends = np.argsort(-reach, kind="stable")
    growing = np.searchsorted(-reach[ends], -np.arange(1, reach.max(initial=0) + 1), side="right")
    largest_first = -np.sort(-sizes_nsg, axis=2)
    filled = np.zeros_like(largest_first[ends])
    last_step = np.full(n, steps)
    for w, count in enumerate(growing):
        task = ends[:count] - w
        emptiest_first = filled[:count]
        emptiest_first += largest_first[task]
        emptiest_first.sort(axis=2)
        last_step[:count] = np.minimum(last_step[:count], steps_n[task])
        while_all_train = np.arange(steps) < last_step[:count, None]
        tokens[ends[:count], w] = (emptiest_first[:, :, -1] * while_all_train).max(axis=1)
    return np.asarray(-(-tokens // multiple) * multiple * wanted_nw)
