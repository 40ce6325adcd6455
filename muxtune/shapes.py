"""Static shapes of hTasks, measured on their tasks' data."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from muxtune.alignment import Alignment, HTaskShape, deal_sequences, group_tokens, stream_tokens
from muxtune.dataset import TaskData

PACKED_MULTIPLE = 8
"""Packed streams are rounded up to this many tokens: matrix libraries are slow for odd sizes (oneDNN on an
AVX-512 core: 198 GFLOP/s at 1073 tokens, 250 at 1080), tensor cores need multiples of 8."""


def htask_microbatches(tasks: Sequence[TaskData]) -> int:
    """Micro-batches per step of a fused hTask: no task gets more sequences at once than it declared."""
    return max(data.task.declared_microbatches for data in tasks)


def step_group_tokens(
    data: TaskData, alignment: Alignment, microbatches: int, row_tokens: int | None
) -> NDArray[np.int64]:
    """Tokens of a task's groups in each of its steps, ``[steps, m]``; no neighbour changes them.

    Where carry groups have several micro-batches, there is a group for each of them.
    """
    rows = []
    for step in range(data.task.steps):
        lengths = data.batch_lengths(step)
        groups = deal_sequences(lengths, alignment, microbatches)
        rows.append(group_tokens(lengths, groups, alignment, row_tokens))
    return np.array(rows, dtype=np.int64)


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
        tasks: Of the hTask.
        sizes: What :func:`step_group_tokens` gives for each.
        alignment: Of the hTask.
        phase: One of :func:`phases`.
        row_tokens: As in :func:`~muxtune.alignment.stream_tokens`.
        carry: Likewise.
    """
    active = [
        tokens[phase.start : phase.stop]
        for data, tokens in zip(tasks, sizes, strict=True)
        if data.task.steps >= phase.stop
    ]
    tokens = stream_tokens(active, alignment, row_tokens=row_tokens, carry=carry)
    return -(-tokens // PACKED_MULTIPLE) * PACKED_MULTIPLE if alignment == "pack" else tokens


def row_tokens_of(tasks: Sequence[TaskData], alignment: Alignment, chunk_tokens: int | None) -> int | None:
    """Row length: the longest declared length under ``pad``, the chunk under ``chunk``."""
    if alignment == "pad":
        return max(data.task.max_length for data in tasks)
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
        tasks: Of the hTask.
        alignment: How sequences are laid out.
        chunk_tokens: Chunk length, for ``chunk``.
        microbatches: Per step; by default what the tasks' micro-batch sizes ask for, and a multiple of
            ``carry``.
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
