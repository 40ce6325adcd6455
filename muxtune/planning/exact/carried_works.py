"""Micro-batches of carry groups, as the sum of what each of their tasks has in them.

It says what :func:`muxtune.batches.layout_step` lays out, without laying it out. What a task has in
the micro-batches of a carry group depends on its own sequences there, and of its neighbours only on how many
chunks they have been dealt before it, so it is worked out once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from muxtune.batches import (
    HTaskShape,
    Piece,
    batched_calls,
    batched_carried_calls,
    cut_chunks,
    deal_sequences,
    group_tokens,
    place_groups,
    share_chunks,
)
from muxtune.costs.compose import MicrobatchWork
from muxtune.peft import Specs, extra
from muxtune.tasks import TaskData

CarryGroup = list[MicrobatchWork]
"""Micro-batches of a carry group, in order."""


def carry_groups(members: Sequence[TaskData], shape: HTaskShape, step: int) -> Iterator[CarryGroup]:
    """Work of the micro-batches of one step, in which all tasks train.

    Args:
        members: Tasks of the hTask.
        shape: Shape with carry groups of several micro-batches.
        step: Number of the optimizer step.
    """
    dealt = [_dealt(each, step, shape) for each in members]
    placed = [each[0].tolist() for each in place_groups([np.array([each.sizes]) for each in dealt], "chunk")]
    pefts = tuple(each.task.peft for each in members)
    for number in range(shape.carry_groups):
        chunks = 0
        shares: list[tuple[_Share, ...]] = []
        for own, group in zip(dealt, placed, strict=True):
            shares.append(own.share(group[number], shape.carry, chunks % shape.carry))
            chunks += len(own.chunks[group[number]])
        yield [_together(shape.tokens, pefts, each) for each in zip(*shares, strict=True)]


class _Share(NamedTuple):
    """What a micro-batch of a carry group has of one task."""

    tokens: int
    """Tokens of the task's chunks in the stream."""
    begun: list[int]
    """Tokens of each sequence that begins here, without keys in front."""
    carried: list[tuple[int, int]]
    """Tokens of each that goes on or has keys in front, and all keys up to here."""
    left: int
    """Tokens of sequences that will go on."""
    targets: int


def _together(tokens: int, pefts: Specs, shares: Sequence[_Share]) -> MicrobatchWork:
    begun = batched_calls(list(chain.from_iterable(share.begun for share in shares)))
    carried = batched_carried_calls(list(chain.from_iterable(share.carried for share in shares)))
    return MicrobatchWork(
        tokens=tokens,
        task_tokens=tuple(share.tokens for share in shares),
        pefts=pefts,
        attention=tuple((1.0, *call) for call in begun),
        targets=float(sum(share.targets for share in shares)),
        carried_attention=tuple((1.0, *call) for call in carried),
        left_tokens=float(sum(share.left for share in shares)),
    )


class _Dealt:
    """A task's global batch of one step, dealt to carry groups and cut into chunks."""

    def __init__(
        self, lengths: NDArray[np.int64], targets: NDArray[np.int64], shape: HTaskShape, front: int
    ) -> None:
        assert shape.row_tokens is not None
        groups = deal_sequences(lengths, "chunk", shape.carry_groups)
        self.sizes = group_tokens(lengths, groups, "chunk", shape.row_tokens)
        """Tokens of each group."""
        self.chunks = [cut_chunks(lengths, group, shape.row_tokens) for group in groups]
        """Chunks of each group."""
        self._chunk_tokens = shape.row_tokens
        self._front = front
        self._lengths: list[int] = lengths.tolist()
        self._targets: list[int] = targets.tolist()
        self._known: dict[tuple[int, int, int], tuple[_Share, ...]] = {}

    def share(self, group: int, carry: int, before: int) -> tuple[_Share, ...]:
        """What each micro-batch of a carry group has.

        Args:
            group: Number of the task's group.
            carry: Micro-batches of the carry group.
            before: Chunks that other tasks have been dealt, modulo ``carry``.
        """
        key = group, carry, before
        if key not in self._known:
            chunks = iter(self.chunks[group])
            _, counts = share_chunks([before, len(self.chunks[group])], carry)
            self._known[key] = tuple(self._measure([next(chunks) for _ in range(count)]) for count in counts)
        return self._known[key]

    def _measure(self, chunks: Sequence[Iterable[Piece]]) -> _Share:
        share = _Share(len(chunks) * self._chunk_tokens, [], [], 0, 0)
        rows: dict[int, tuple[int, int]] = {}  # begin and end in the sequence
        for part in chain.from_iterable(chunks):
            end = part.offset + part.length
            begin, last = rows.get(part.sequence, (part.offset, end))
            rows[part.sequence] = min(begin, part.offset), max(last, end)
        left = targets = 0
        for sequence, (begin, end) in rows.items():
            length = self._lengths[sequence]
            if begin + self._front:
                share.carried.append((end - begin, self._front + end))
            else:
                share.begun.append(end)
            left += (end - begin) * (end < length)
            # Predicted are the last tokens, each by the one before it.
            targets += max(0, min(end, length - 1) - max(begin, length - 1 - self._targets[sequence]))
        return share._replace(left=left, targets=targets)


_KNOWN: WeakKeyDictionary[TaskData, dict[tuple[object, ...], _Dealt]] = WeakKeyDictionary()


def _dealt(data: TaskData, step: int, shape: HTaskShape) -> _Dealt:
    known = _KNOWN.setdefault(data, {})
    key = (step, shape.carry_groups, shape.row_tokens)
    if key not in known:
        targets = data.targets[data.step_indices(step)]
        known[key] = _Dealt(data.batch_lengths(step), targets, shape, extra(data.task.peft).keys)
    return known[key]
