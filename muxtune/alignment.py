"""Data alignment: where every sequence lies in the flat token stream of a micro-batch (paper section 3.5).

A micro-batch of an hTask is one stream of tokens; all micro-batches of an hTask are equally long. The
sequences of a task lie together:

    pad     one row per sequence, every row as long as the longest declared length of the hTask
    pack    sequences one after the other
    chunk   sequences packed into chunks of C tokens; a chunk has one task, and no sequence crosses it

      pad   |aaaa....|aaaaaaa.|bbbbbbbb|bb......|
      pack  |aaaaaaaaaaabbbbbbbbbb...|
      chunk |aaaaaaaaaaa.....|bbbbbbbbbb......|          C = 16

What is left at the end of the stream belongs to no task.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from muxtune.errors import SpecError

Alignment = Literal["pad", "pack", "chunk"]


@dataclass(frozen=True, slots=True, kw_only=True)
class HTaskShape:
    """Static shape of an hTask's micro-batches."""

    alignment: Alignment
    row_tokens: int | None
    """Row length of ``pad``, chunk length of ``chunk``, None for ``pack``."""
    microbatches: int
    """Per optimizer step, on each replica."""
    tokens: int
    """Length of the stream, padding included."""
    replicas: int = 1
    """Data-parallel replicas, each with its own micro-batches of every step."""

    @property
    def groups(self) -> int:
        """Micro-batches per optimizer step on all replicas."""
        return self.microbatches * self.replicas


@dataclass(frozen=True, slots=True)
class Segment:
    """One sequence in a micro-batch."""

    task: int
    """Index of the task inside its hTask."""
    sequence: int
    """Index in the task's global batch."""
    start: int
    """Offset of its first token in the stream."""
    length: int
    """Tokens of the example."""
    row_tokens: int
    """Slots that attention works on: the padded row under ``pad``, else ``length``."""


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens ``start`` to ``stop`` of the stream belong to the task with that index."""

    task: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class MicrobatchLayout:
    """Where everything lies in one micro-batch."""

    tokens: int
    spans: tuple[Span, ...]
    """Of every task that still trains; empty where the micro-batch has no sequence of it."""
    segments: tuple[Segment, ...]

    @property
    def effective_tokens(self) -> int:
        """Tokens of examples, without any padding."""
        return sum(segment.length for segment in self.segments)


Groups = list[list[int]]
"""Sequences of one task's global batch, dealt to as many groups as there are micro-batches."""


def deal_sequences(lengths: NDArray[np.int64], alignment: Alignment, microbatches: int) -> Groups:
    """Deal a task's global batch into one group per micro-batch, of at most ``ceil(n / m)`` sequences.

    ``pad`` keeps the order. The others even out the tokens: longest first, back and forth over the groups.
    The loss of a step does not depend on this choice.
    """
    if alignment == "pad":
        room = -(-len(lengths) // microbatches)
        return [list(range(i * room, min((i + 1) * room, len(lengths)))) for i in range(microbatches)]
    groups: Groups = [[] for _ in range(microbatches)]
    for position, index in enumerate(np.argsort(-lengths, kind="stable")):
        turn, place = divmod(position, microbatches)
        groups[place if turn % 2 == 0 else microbatches - 1 - place].append(int(index))
    return [sorted(group) for group in groups]


def group_tokens(
    lengths: NDArray[np.int64], groups: Groups, alignment: Alignment, row_tokens: int | None
) -> list[int]:
    """Tokens that each group of a task takes in a stream.

    Raises:
        SpecError: A sequence is longer than a row or chunk.
    """
    if alignment == "pack":
        return [int(lengths[group].sum()) for group in groups]
    assert row_tokens is not None
    _require_rows(lengths, alignment, row_tokens)
    if alignment == "pad":
        return [len(group) * row_tokens for group in groups]
    return [len(pack_chunks(lengths, group, row_tokens)) * row_tokens for group in groups]


def place_groups(sizes: Sequence[NDArray[np.int64]], alignment: Alignment) -> list[NDArray[np.int64]]:
    """Which group of each task goes into which micro-batch, for many steps at once.

    Under ``pad`` group i goes into micro-batch i. The others even out the streams: task by task from the
    last, the largest group into the emptiest micro-batch.

    Args:
        sizes: Per task, tokens of its groups, ``[steps, m]``.
        alignment: Of the hTask.

    Returns:
        Per task ``[steps, m]``: the group in each micro-batch.
    """
    steps, m = sizes[0].shape
    if alignment == "pad":
        return [np.broadcast_to(np.arange(m), (steps, m)) for _ in sizes]
    filled = np.zeros((steps, m), dtype=np.int64)
    placed: list[NDArray[np.int64]] = []
    for tokens in reversed(sizes):
        largest_first = np.argsort(-tokens, axis=1, kind="stable")
        emptiest_first = np.argsort(filled, axis=1, kind="stable")
        group = np.empty((steps, m), dtype=np.int64)
        np.put_along_axis(group, emptiest_first, largest_first, axis=1)
        filled += np.take_along_axis(tokens, group, axis=1)
        placed.append(group)
    return placed[::-1]


def stream_tokens(sizes: Sequence[NDArray[np.int64]], alignment: Alignment) -> int:
    """Length that holds every micro-batch of some steps; arguments as in :func:`place_groups`."""
    placed = place_groups(sizes, alignment)
    filled = sum(
        np.take_along_axis(tokens, group, axis=1) for tokens, group in zip(sizes, placed, strict=True)
    )
    return int(np.max(filled))


def layout_step(
    shape: HTaskShape, lengths: Sequence[NDArray[np.int64]], *, tokens: int | None = None
) -> list[MicrobatchLayout]:
    """Layouts of all micro-batches of one step, those of a replica in a row.

    Args:
        shape: Static shape of the hTask.
        lengths: Per task, tokens of each sequence of its global batch; empty for a task that has finished,
            which then has no span.
        tokens: Length of the stream, where it is not the shape's.

    Raises:
        SpecError: The sequences need more room.
    """
    tokens = shape.tokens if tokens is None else tokens
    active = [task for task, each in enumerate(lengths) if len(each)]
    groups = [deal_sequences(lengths[task], shape.alignment, shape.groups) for task in active]
    sizes = [
        np.array([group_tokens(lengths[task], dealt, shape.alignment, shape.row_tokens)])
        for task, dealt in zip(active, groups, strict=True)
    ]
    placed = place_groups(sizes, shape.alignment)
    layouts = []
    for microbatch in range(shape.groups):
        spans: list[Span] = []
        segments: list[Segment] = []
        start = 0
        for task, dealt, size, group in zip(active, groups, sizes, placed, strict=True):
            chosen = group[0, microbatch]
            segments += _place(task, dealt[chosen], lengths[task], start, shape)
            stop = start + int(size[0, chosen])
            spans.append(Span(task, start, stop))
            start = stop
        if start > tokens:
            raise SpecError("tokens_per_microbatch", tokens, f"at least {start}, what this step needs")
        layouts.append(MicrobatchLayout(tokens, tuple(spans), tuple(segments)))
    return layouts


def _place(
    task: int, members: Sequence[int], lengths: NDArray[np.int64], start: int, shape: HTaskShape
) -> list[Segment]:
    if shape.alignment == "pad":
        row = shape.row_tokens
        assert row is not None
        return [
            Segment(task, index, start + i * row, int(lengths[index]), row) for i, index in enumerate(members)
        ]
    if shape.alignment == "pack":
        bins, bin_tokens = [list(members)], 0
    else:
        assert shape.row_tokens is not None
        bins, bin_tokens = pack_chunks(lengths, members, shape.row_tokens), shape.row_tokens
    segments = []
    for number, content in enumerate(bins):
        offset = start + number * bin_tokens
        for index in content:
            length = int(lengths[index])
            segments.append(Segment(task, index, offset, length, length))
            offset += length
    return segments


def pack_chunks(lengths: NDArray[np.int64], members: Sequence[int], chunk_tokens: int) -> Groups:
    """Sequences into chunks, first-fit decreasing."""
    bins: Groups = []
    free: list[int] = []
    for index in sorted(members, key=lambda i: (-int(lengths[i]), i)):
        length = int(lengths[index])
        target = next((i for i, room in enumerate(free) if room >= length), None)
        if target is None:
            target = len(bins)
            bins.append([])
            free.append(chunk_tokens)
        bins[target].append(index)
        free[target] -= length
    return bins


def _require_rows(lengths: NDArray[np.int64], alignment: Alignment, row_tokens: int) -> None:
    longest = int(lengths.max())
    if longest > row_tokens:
        field = "chunk_tokens" if alignment == "chunk" else "row_tokens"
        raise SpecError(field, row_tokens, f"at least the longest sequence ({longest} tokens)")


ROW_MULTIPLE = 16
"""Attention rows are this long or a multiple: kernels work in vectors of 16 (SDPA on an AVX-512 core, forward
of four sequences: 583 us at 63 tokens, 418 at 64)."""


def row_slots(longest: int) -> int:
    """Slots of each row of an attention call whose longest sequence has ``longest`` tokens."""
    return -(-longest // ROW_MULTIPLE) * ROW_MULTIPLE


def attention_calls(layout: MicrobatchLayout) -> list[tuple[int, int]]:
    """Batched attention calls of a micro-batch, as (sequences, slots of a row)."""
    return batched_calls([segment.row_tokens for segment in layout.segments])


def batched_calls(row_tokens: Sequence[int]) -> list[tuple[int, int]]:
    """:func:`attention_calls` of rows of these lengths."""
    return [(len(group), row_slots(row_tokens[group[0]])) for group in group_by_length(row_tokens)]


def group_by_length(row_tokens: Sequence[int]) -> Groups:
    """Sequences whose attention is computed in one batched call: near-equal lengths.

    A call has a fixed cost, and every sequence of a group costs as much as the longest; a member is at
    least three quarters as long as the longest, or within 8 tokens of it.

    Returns:
        Groups of indices into ``row_tokens``, longest first, each group's longest first.
    """
    groups: Groups = []
    limit = 0.0
    for index in sorted(range(len(row_tokens)), key=lambda i: (-row_tokens[i], i)):
        length = row_tokens[index]
        if not groups or length < limit:
            groups.append([])
            limit = min(0.75 * length, length - 8)
        groups[-1].append(index)
    return groups
