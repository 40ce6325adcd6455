"""What the alignment of a plan's data costs in tokens, and what the other alignments would cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from pydantic import Field

from muxtune.batches.layout import Alignment, HTaskShape
from muxtune.batches.shapes import measure_shape
from muxtune.support.strict_models import StrictModel
from muxtune.tasks import TaskData

MeasureTokens = Callable[[tuple[str, ...], Alignment, int | None, int], int]
"""Tokens of a micro-batch, by its tasks' ids, alignment, chunk length and the groups of a step."""


class TokenCounts(StrictModel):
    """Tokens of one iteration under some alignment."""

    all: int = Field(ge=0)
    """Tokens that go through the backbone, on all replicas; see
    :meth:`muxtune.batches.HTaskShape.step_tokens`."""
    effective: float = Field(ge=0)
    """Tokens of examples; the mean over the steps."""
    billed: int = Field(ge=0)
    """Examples padded to their task's own max length."""
    ineffective: float
    """``all - effective``."""


class AlignmentReport(StrictModel):
    """Tokens of one iteration of a plan, and of the same hTasks under one alignment for all of them."""

    plan: TokenCounts
    """As planned."""
    pad: TokenCounts
    """All hTasks under ``pad``."""
    pack: TokenCounts
    """All hTasks under ``pack``."""
    chunk: TokenCounts
    """All hTasks under ``chunk``."""
    chunk_tokens: tuple[int, ...]
    """Per hTask, chunk length that ``chunk`` is counted with."""


def alignment_report(
    data: Mapping[str, TaskData],
    htasks: Sequence[tuple[tuple[str, ...], HTaskShape]],
    *,
    chunk_tokens: int | None = None,
    measure: MeasureTokens | None = None,
) -> AlignmentReport:
    """Count the tokens of a plan and of its alternatives.

    Args:
        data: Data of each task, by task id.
        htasks: Task ids and shape of each hTask.
        chunk_tokens: Chunk length of the alternative ``chunk``, for hTasks that it can hold. By default and
            for others, the hTask's own chunk length, or else :func:`smallest_chunk`.
        measure: Where shapes are known already; measured on the data by default.
    """
    count = measure or _measuring(data)
    effective = effective_tokens(data[task_id] for ids, _ in htasks for task_id in ids)
    tasks = [data[task_id].task for ids, _ in htasks for task_id in ids]
    billed = sum(task.global_batch_size * task.max_length for task in tasks)
    chunks = tuple(
        _chunk_of([data[task_id] for task_id in ids], shape, chunk_tokens) for ids, shape in htasks
    )

    def counts(tokens: int) -> TokenCounts:
        return TokenCounts(all=tokens, effective=effective, billed=billed, ineffective=tokens - effective)

    def step_tokens(ids: tuple[str, ...], shape: HTaskShape) -> int:
        return shape.step_tokens(data[task_id].task.global_batch_size for task_id in ids)

    def alternative(alignment: Alignment) -> TokenCounts:
        total = 0
        for (ids, shape), chunk in zip(htasks, chunks, strict=True):
            length = chunk if alignment == "chunk" else None
            known = (shape.alignment, shape.row_tokens) == (alignment, length) or (
                shape.alignment == alignment == "pad"
            )
            other = shape
            if not known:  # a carry group is cut out of one micro-batch
                other = replace(
                    shape,
                    alignment=alignment,
                    microbatches=shape.microbatches // shape.carry,
                    carry=1,
                    tokens=count(ids, alignment, length, shape.carry_groups),
                )
            total += step_tokens(ids, other)
        return counts(total)

    return AlignmentReport(
        plan=counts(sum(step_tokens(ids, shape) for ids, shape in htasks)),
        pad=alternative("pad"),
        pack=alternative("pack"),
        chunk=alternative("chunk"),
        chunk_tokens=chunks,
    )


def effective_tokens(tasks: Iterable[TaskData]) -> float:
    """Tokens of one step's examples of all tasks; the mean over each task's steps."""
    return sum(data.step_tokens for data in tasks)


def smallest_chunk(tasks: Iterable[TaskData]) -> int:
    """The smallest power of two that holds every sequence."""
    return 1 << (max(data.longest for data in tasks) - 1).bit_length()


def _chunk_of(tasks: Sequence[TaskData], shape: HTaskShape, chunk_tokens: int | None) -> int:
    longest = max(data.longest for data in tasks)
    if chunk_tokens is not None and chunk_tokens >= longest:
        return chunk_tokens
    if shape.alignment == "chunk" and shape.row_tokens is not None:
        return shape.row_tokens
    return smallest_chunk(tasks)


def _measuring(data: Mapping[str, TaskData]) -> MeasureTokens:
    def tokens(ids: tuple[str, ...], alignment: Alignment, chunk_tokens: int | None, groups: int) -> int:
        members = [data[task_id] for task_id in ids]
        return measure_shape(members, alignment, chunk_tokens=chunk_tokens, microbatches=groups).tokens

    return tokens
