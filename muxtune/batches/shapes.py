"""Static shapes of hTasks, measured on their tasks' data."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from muxtune.batches.dealing import chunked_sizes, deal_lengths, group_counts, largest_stream, packed_sizes
from muxtune.batches.layout import Alignment, HTaskShape
from muxtune.support.errors import SpecError
from muxtune.tasks import TaskData

PACKED_MULTIPLE = 8
"""Packed streams are rounded up to this many tokens: matrix libraries are slow for odd sizes (oneDNN on an
AVX-512 core: 198 GFLOP/s at 1073 tokens, 250 at 1080), tensor cores need multiples of 8."""


def htask_microbatches(tasks: Sequence[TaskData]) -> int:
    """Micro-batches per step of a fused hTask: no task gets more sequences at once than it declared."""
    return max(data.task.declared_microbatches for data in tasks)


def step_group_tokens(
    data: TaskData, alignment: Alignment, microbatches: int, row_tokens: int | None
) -> NDArray[np.int64]:
    """Tokens of a task's groups in each of its distinct steps, ``[steps, m]``; no neighbour changes them.

    Where carry groups have several micro-batches, there is a group for each of them. Under ``pad`` all steps
    are alike, and there is one row.

    Raises:
        SpecError: A sequence is longer than a row.
    """
    size = data.task.global_batch_size
    if alignment == "pad":
        assert row_tokens is not None
        if data.longest > row_tokens:
            expected = f"at least the longest sequence ({data.longest} tokens)"
            raise SpecError("row_tokens", row_tokens, expected)
        return group_counts(size, microbatches)[None] * row_tokens
    at_once = max(1, _SEQUENCES_AT_ONCE // size)
    rows = []
    for first in range(0, data.distinct_steps, at_once):
        steps = np.arange(first, min(first + at_once, data.distinct_steps))
        dealt = deal_lengths(-np.sort(-data.lengths[data.step_indices(steps)], axis=1), microbatches)
        if alignment == "pack":
            rows.append(packed_sizes(dealt))
        else:
            assert row_tokens is not None
            rows.append(chunked_sizes(dealt, row_tokens))
    return np.concatenate(rows)


_SEQUENCES_AT_ONCE = 1 << 18
"""Sequences whose steps are dealt at once: their arrays fit the processor's cache."""


def phases(tasks: Sequence[TaskData]) -> list[range]:
    """Steps of an hTask during which the same tasks train; the first phase has all of them."""
    ends = sorted({data.task.steps for data in tasks})
    return [range(start, stop) for start, stop in pairwise([0, *ends])]


def phase_tokens(
    tasks: Sequence[TaskData],
    sizes: Sequence[NDArray[np.int64]],
    alignment: Alignment,
    phase: range,
    *,
    row_tokens: int | None = None,
    carry: int = 1,
) -> int:
    """Length of the stream in one phase.

    Args:
        tasks: Tasks of the hTask.
        sizes: What :func:`step_group_tokens` gives for each.
        alignment: Alignment of the hTask.
        phase: One of :func:`phases`.
        row_tokens: Chunk length under ``chunk``; needed where carry groups have several micro-batches.
        carry: Micro-batches of a carry group.
    """
    active = [tokens for data, tokens in zip(tasks, sizes, strict=True) if data.task.steps >= phase.stop]
    if alignment == "pad":
        return int(np.sum(active, axis=0).max())
    tokens = largest_stream(active, phase)
    if carry > 1:
        assert row_tokens is not None
        tokens = -(-tokens // (carry * row_tokens)) * row_tokens
    return -(-tokens // PACKED_MULTIPLE) * PACKED_MULTIPLE if alignment == "pack" else tokens


def row_tokens_of(tasks: Sequence[TaskData], alignment: Alignment, chunk_tokens: int | None) -> int | None:
    """Row length: that of the longest sequence allowed under ``pad``, the chunk under ``chunk``."""
    if alignment == "pad":
        return max(data.task.row_tokens for data in tasks)
    return chunk_tokens if alignment == "chunk" else None


def measure_shape(
    tasks: Sequence[TaskData],
    alignment: Alignment,
    *,
    chunk_tokens: int | None = None,
    microbatches: int | None = None,
    carry: int = 1,
) -> HTaskShape:
    """Smallest static shape that holds every micro-batch of the steps in which all tasks train.

    Packed streams are rounded up to :data:`PACKED_MULTIPLE`.

    Args:
        tasks: Tasks of the hTask.
        alignment: How sequences are laid out.
        chunk_tokens: Chunk length, for ``chunk``.
        microbatches: Micro-batches per step; by default what the tasks' micro-batch sizes ask for, and a
            multiple of ``carry``.
        carry: Micro-batches over which the chunks of a sequence may spread.
    """
    m = microbatches or -(-htask_microbatches(tasks) // carry) * carry
    row_tokens = row_tokens_of(tasks, alignment, chunk_tokens)
    sizes = [step_group_tokens(data, alignment, m // carry, row_tokens) for data in tasks]
    return HTaskShape(
        alignment=alignment,
        row_tokens=row_tokens,
        microbatches=m,
        tokens=phase_tokens(tasks, sizes, alignment, phases(tasks)[0], row_tokens=row_tokens, carry=carry),
        carry=carry,
    )
