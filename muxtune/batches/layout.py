"""Data alignment: where every sequence lies in the flat token stream of a micro-batch (paper section 3.5).

A micro-batch of an hTask is one stream of tokens; all micro-batches of an hTask are equally long. The
sequences of a task lie together:

    pad     one row per sequence, every row as long as the longest declared length of the hTask
    pack    sequences one after the other
    chunk   sequences packed into chunks of C tokens; a chunk has one task, and a longer sequence takes
            several (:mod:`muxtune.batches.chunks`)

      pad   |aaaa....|aaaaaaa.|bbbbbbbb|bb......|
      pack  |aaaaaaaaaaabbbbbbbbbb...|
      chunk |aaaaaaaaaaa.....|bbbbbbbbbb......|          C = 16

What is left at the end of the stream belongs to no task.

The chunks of a sequence may spread over the micro-batches of a carry group, several in a row: those behind
attend to the keys and values of those before, so the group goes back in reverse order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from muxtune.batches.chunks import Piece, SequenceGroups, count_chunks, cut_chunks, share_chunks
from muxtune.support.errors import SpecError

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
    carry: int = 1
    """Micro-batches of a carry group, over which a sequence may spread; a divisor of ``microbatches``."""

    @property
    def groups(self) -> int:
        """Micro-batches per optimizer step on all replicas."""
        return self.microbatches * self.replicas

    @property
    def carry_groups(self) -> int:
        """Carry groups per optimizer step on all replicas; as many as micro-batches by default."""
        return self.groups // self.carry

    def step_tokens(self, sequences: Iterable[int], *, tokens: int | None = None) -> int:
        """Tokens that go through the backbone in a step, on all replicas.

        Micro-batches without any sequence do not count: replicas that have nothing to do keep the others
        company. In a carry group all count or none.

        Args:
            sequences: Sequences in each task's global batch; 0 for a task that has finished.
            tokens: Length of the stream, where it is not the shape's.
        """
        groups = self.carry_groups
        sizes = [size for size in sequences if size]
        if self.alignment == "pad":  # every task begins with the first
            occupied = max((-(-size // -(-size // groups)) for size in sizes), default=0)
        else:  # every task begins with what the others left empty
            occupied = min(sum(sizes), groups)
        return occupied * self.carry * (self.tokens if tokens is None else tokens)


@dataclass(frozen=True, slots=True)
class Segment:
    """One sequence in a micro-batch, or a part of it."""

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
    offset: int = 0
    """Tokens of the sequence before these: in the same micro-batch, or earlier ones of its carry group."""
    after: int = 0
    """Tokens of the sequence behind these."""


@dataclass(frozen=True, slots=True)
class Row:
    """All of a sequence that lies in one micro-batch: what attention works on as one."""

    parts: tuple[Segment, ...]
    """One after the other in the sequence, if not in the stream."""
    front: int = 0
    """Keys and values of its task that stand in front of the sequence (:class:`muxtune.peft.Extra`)."""

    @property
    def tokens(self) -> int:
        """Slots of the parts."""
        return sum(part.row_tokens for part in self.parts)

    @property
    def length(self) -> int:
        """Tokens of the example in the parts."""
        return sum(part.length for part in self.parts)

    @property
    def carried(self) -> int:
        """Keys and values from elsewhere that it attends to as well.

        Those in front come first, then those of the sequence's tokens in earlier micro-batches.
        """
        return self.front + self.parts[0].offset

    @property
    def after(self) -> int:
        """Tokens of the sequence in later micro-batches, which attend to these."""
        return self.parts[-1].after


def sequence_rows(segments: Iterable[Segment], fronts: Sequence[int] = ()) -> list[Row]:
    """Segments of a micro-batch by their sequences, in the order of first parts in the stream.

    Args:
        segments: The segments.
        fronts: Per task of the hTask, keys and values in front of each sequence; by default there are none.
    """
    parts: dict[tuple[int, int], list[Segment]] = {}
    for segment in segments:
        parts.setdefault((segment.task, segment.sequence), []).append(segment)
    return [
        Row(
            tuple(each if len(each) == 1 else sorted(each, key=lambda part: part.offset)),
            fronts[task] if fronts else 0,
        )
        for (task, _), each in parts.items()
    ]


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
    """Span of every task that still trains; empty where the micro-batch has no sequence of it."""
    segments: tuple[Segment, ...]

    @property
    def effective_tokens(self) -> int:
        """Tokens of examples, without any padding."""
        return sum(segment.length for segment in self.segments)


def deal_sequences(lengths: NDArray[np.int64], alignment: Alignment, microbatches: int) -> SequenceGroups:
    """Deal a task's global batch into ``m`` groups of at most ``ceil(n / m)`` sequences.

    A group is for one micro-batch, or for a carry group.

    ``pad`` keeps the order. The others even out the tokens: longest first, back and forth over the groups.
    The loss of a step does not depend on this choice.
    """
    if alignment == "pad":
        room = -(-len(lengths) // microbatches)
        return [list(range(i * room, min((i + 1) * room, len(lengths)))) for i in range(microbatches)]
    groups: SequenceGroups = [[] for _ in range(microbatches)]
    for position, index in enumerate(np.argsort(-lengths, kind="stable")):
        turn, place = divmod(position, microbatches)
        groups[place if turn % 2 == 0 else microbatches - 1 - place].append(int(index))
    return [sorted(group) for group in groups]


def group_tokens(
    lengths: NDArray[np.int64], groups: SequenceGroups, alignment: Alignment, row_tokens: int | None
) -> list[int]:
    """Tokens that each group of a task takes in a stream, or in all streams of a carry group.

    Raises:
        SpecError: A sequence is longer than a row.
    """
    if alignment == "pack":
        return [int(lengths[group].sum()) for group in groups]
    assert row_tokens is not None
    if alignment == "chunk":
        return [count_chunks(lengths, group, row_tokens) * row_tokens for group in groups]
    longest = int(lengths.max())
    if longest > row_tokens:
        raise SpecError("row_tokens", row_tokens, f"at least the longest sequence ({longest} tokens)")
    return [len(group) * row_tokens for group in groups]


def place_groups(sizes: Sequence[NDArray[np.int64]], alignment: Alignment) -> list[NDArray[np.int64]]:
    """Choose the micro-batch, or carry group, of each task's groups, for many steps at once.

    Under ``pad`` group i goes into micro-batch i. The others even out the streams: task by task from the
    last, the largest group into the emptiest micro-batch.

    Args:
        sizes: Per task, tokens of its groups, ``[steps, m]``.
        alignment: Alignment of the hTask.

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
    groups = [deal_sequences(lengths[task], shape.alignment, shape.carry_groups) for task in active]
    sizes = [
        np.array([group_tokens(lengths[task], dealt, shape.alignment, shape.row_tokens)])
        for task, dealt in zip(active, groups, strict=True)
    ]
    placed = place_groups(sizes, shape.alignment)
    layouts: list[MicrobatchLayout] = []
    for number in range(shape.carry_groups):
        members = [dealt[group[0, number]] for dealt, group in zip(groups, placed, strict=True)]
        blocks = [
            _blocks(task, content, lengths[task], shape)
            for task, content in zip(active, members, strict=True)
        ]
        layouts += _lay_out(active, blocks, tokens, shape.carry)
    return layouts


@dataclass(frozen=True, slots=True)
class _Block:
    """Tokens of a stream that stay together; its segments start from 0."""

    tokens: int
    segments: tuple[Segment, ...]


def _blocks(task: int, members: Sequence[int], lengths: NDArray[np.int64], shape: HTaskShape) -> list[_Block]:
    """Rows, sequences or chunks of a task in a carry group, in their order."""
    row = shape.row_tokens
    if shape.alignment == "chunk":
        assert row is not None
        return [_chunk(task, parts, lengths, row) for parts in cut_chunks(lengths, members, row)]
    blocks = []
    for index in members:
        length = int(lengths[index])
        slots = length if row is None else row
        blocks.append(_Block(slots, (Segment(task, index, 0, length, slots),)))
    return blocks


def _chunk(task: int, parts: Sequence[Piece], lengths: NDArray[np.int64], chunk_tokens: int) -> _Block:
    segments, start = [], 0
    for part in parts:
        after = int(lengths[part.sequence]) - part.offset - part.length
        segments.append(Segment(task, part.sequence, start, part.length, part.length, part.offset, after))
        start += part.length
    return _Block(chunk_tokens, tuple(segments))


def _lay_out(
    tasks: Sequence[int], blocks: Sequence[Sequence[_Block]], tokens: int, carry: int
) -> list[MicrobatchLayout]:
    """Layouts of the micro-batches of a carry group."""
    shares = list(share_chunks([len(each) for each in blocks], carry))
    taken = [0] * len(tasks)
    layouts = []
    for microbatch in range(carry):
        spans: list[Span] = []
        segments: list[Segment] = []
        start = 0
        for place, task in enumerate(tasks):
            first, count = start, shares[place][microbatch]
            for block in blocks[place][taken[place] : taken[place] + count]:
                segments += [replace(segment, start=start + segment.start) for segment in block.segments]
                start += block.tokens
            taken[place] += count
            spans.append(Span(task, first, start))
        if start > tokens:
            raise SpecError("tokens_per_microbatch", tokens, f"at least {start}, what this step needs")
        layouts.append(MicrobatchLayout(tokens, tuple(spans), tuple(segments)))
    return layouts


ROW_MULTIPLE = 16
"""Attention rows are this long or a multiple: kernels work in vectors of 16 (SDPA on an AVX-512 core, forward
of four sequences: 583 us at 63 tokens, 418 at 64)."""


def row_slots(longest: int) -> int:
    """Slots of each row of an attention call whose longest sequence has ``longest`` tokens."""
    return -(-longest // ROW_MULTIPLE) * ROW_MULTIPLE


def attention_calls(layout: MicrobatchLayout, fronts: Sequence[int] = ()) -> list[tuple[int, int]]:
    """Batched attention calls of what begins in a micro-batch, as (sequences, slots of a row)."""
    return batched_calls([row.tokens for row in sequence_rows(layout.segments, fronts) if not row.carried])


def group_carried_rows(rows: Sequence[Row]) -> SequenceGroups:
    """Rows with keys from elsewhere that share a call: near-equal in keys, and in queries."""
    return _group_by_both([(row.tokens, row.carried + row.tokens) for row in rows])


def batched_carried_calls(rows: Sequence[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """Batched calls of rows of so many tokens with so many keys, as (sequences, queries, keys) in slots."""
    calls = []
    for group in _group_by_both(rows):
        queries, keys = (row_slots(max(each)) for each in zip(*(rows[i] for i in group), strict=True))
        calls.append((len(group), queries, keys))
    return calls


def _group_by_both(rows: Sequence[tuple[int, int]]) -> SequenceGroups:
    groups: SequenceGroups = []
    for near in group_by_length([keys for _, keys in rows]):
        groups += [[near[i] for i in each] for each in group_by_length([rows[i][0] for i in near])]
    return groups


def batched_calls(row_tokens: Sequence[int]) -> list[tuple[int, int]]:
    """:func:`attention_calls` of rows of these lengths."""
    return [(len(group), row_slots(row_tokens[group[0]])) for group in group_by_length(row_tokens)]


def group_by_length(row_tokens: Sequence[int]) -> SequenceGroups:
    """Sequences whose attention is computed in one batched call: near-equal lengths.

    A call has a fixed cost, and every sequence of a group costs as much as the longest; a member is at
    least three quarters as long as the longest, or within 8 tokens of it.

    Returns:
        Groups of indices into ``row_tokens``, longest first, each group's longest first.
    """
    groups: SequenceGroups = []
    limit = 0.0
    for index in sorted(range(len(row_tokens)), key=row_tokens.__getitem__, reverse=True):  # stable
        length = row_tokens[index]
        if not groups or length < limit:
            groups.append([])
            limit = min(0.75 * length, length - 8)
        groups[-1].append(index)
    return groups
