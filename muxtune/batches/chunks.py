"""Chunks of a task: runs of C tokens, into which its sequences are cut and packed.

A sequence of more than C tokens is cut from its start: full chunks, and a rest that shares a chunk with other
rests and short sequences. Chunks stand in an order in which the parts of a sequence follow each other. The
micro-batches of a carry group take consecutive runs of that order, so part j lies in the same micro-batch as
part j + 1 or in an earlier one.

      a, b, c of 19, 4 and 2 tokens, C = 8       |aaaaaaaa|aaaaaaaa|bbbbaaa.|cc......|
      a carry group of two micro-batches         |aaaaaaaa|aaaaaaaa|  and  |bbbbaaa.|cc......|
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

SequenceGroups = list[list[int]]
"""Indices of sequences."""


class Piece(NamedTuple):
    """Consecutive tokens of a sequence."""

    sequence: int
    """Index in the task's global batch."""
    offset: int
    """Tokens of the sequence before it."""
    length: int


def pack_chunks(lengths: NDArray[np.int64], members: Sequence[int], chunk_tokens: int) -> SequenceGroups:
    """Sequences into chunks, first-fit decreasing; none is longer than a chunk."""
    bins: SequenceGroups = []
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


def cut_chunks(lengths: NDArray[np.int64], members: Sequence[int], chunk_tokens: int) -> list[list[Piece]]:
    """Sequences into chunks, in an order in which no part stands before an earlier one of its sequence.

    Longest first; a chunk of rests follows the full chunks of all its sequences.

    Args:
        lengths: Tokens of each sequence of the task's global batch.
        members: Indices of the sequences to cut.
        chunk_tokens: C, the tokens of a chunk.
    """
    rests = lengths % chunk_tokens
    longest_first = sorted(members, key=lambda i: (-int(lengths[i]), i))
    rank = {index: place for place, index in enumerate(longest_first)}
    chunks: list[tuple[tuple[int, int], list[Piece]]] = []
    for index in longest_first:
        full = int(lengths[index]) // chunk_tokens
        chunks += [((rank[index], j), [Piece(index, j * chunk_tokens, chunk_tokens)]) for j in range(full)]
    after_all = int(lengths.max(initial=0))
    for content in pack_chunks(rests, [index for index in members if rests[index]], chunk_tokens):
        parts = [Piece(index, int(lengths[index] - rests[index]), int(rests[index])) for index in content]
        chunks.append(((max(rank[index] for index in content), after_all), parts))
    return [parts for _, parts in sorted(chunks, key=lambda chunk: chunk[0])]


def count_chunks(lengths: NDArray[np.int64], members: Sequence[int], chunk_tokens: int) -> int:
    """Chunks that :func:`cut_chunks` makes."""
    rests = lengths % chunk_tokens
    full = int((lengths[list(members)] // chunk_tokens).sum())
    return full + len(pack_chunks(rests, [index for index in members if rests[index]], chunk_tokens))


def share_chunks(counts: Sequence[int], microbatches: int) -> Iterator[list[int]]:
    """Chunks of each task that each micro-batch of a carry group takes.

    One after the other, as cards are dealt, so the micro-batches have equally many, but for one.

    Args:
        counts: Per task, its chunks.
        microbatches: Micro-batches of the carry group.

    Yields:
        Per task, a number for each micro-batch.
    """
    dealt = 0
    for count in counts:
        ends = [(dealt + count - k + microbatches - 1) // microbatches for k in range(microbatches)]
        starts = [(dealt - k + microbatches - 1) // microbatches for k in range(microbatches)]
        yield [end - start for start, end in zip(starts, ends, strict=True)]
        dealt += count
