"""One micro-batch as tensors: the flat token stream, its sequences and its targets."""

# T tokens of the stream, N target tokens

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from muxtune.batches import MicrobatchLayout, Segment, Span
from muxtune.graph.attention_backends import DEFAULT_ATTENTION, AttentionName
from muxtune.peft import NOTHING, Extra
from muxtune.tasks import Example
from runtime.attention import AttentionPlan, build_attention_plan
from runtime.attention.carried_kv import CarriedKv
from runtime.ops.dropout import sequence_key, token_keys
from runtime.ops.to_device import on_device


@dataclass(frozen=True, slots=True, kw_only=True)
class MicrobatchTensors:
    """What the stages need to know about a micro-batch."""

    tokens_T: Tensor
    """Token ids; 0 at virtual tokens and where there is padding."""
    positions_T: Tensor
    """Position of each token in its sequence, behind what its method puts in front; runs on in the padding of
    a row, 0 outside of rows."""
    spans: tuple[Span, ...]
    """Tokens of each active task."""
    task_ids: tuple[str, ...]
    """Task of each span: whose adapters its tokens go through."""
    attention: AttentionPlan
    target_rows_N: Tensor
    """Stream position before each target token: the one that predicts it. Ordered by task."""
    target_ids_N: Tensor
    """Token ids to predict."""
    target_spans: tuple[tuple[int, int], ...]
    """Targets of each span, as (start, stop) into N."""
    dropout_keys_T: Tensor | None = None
    """States of the tokens that masks are computed from (:mod:`runtime.ops.dropout`); anything at padding and
    at tokens of tasks without dropout, None if no task has it."""


def build_microbatch(
    layout: MicrobatchLayout,
    batches: Sequence[Sequence[Example]],
    device: str = "cpu",
    *,
    task_ids: Sequence[str],
    attention: AttentionName = DEFAULT_ATTENTION,
    carried: CarriedKv | None = None,
    earlier: Sequence[MicrobatchLayout] = (),
    extras: Sequence[Extra] = (),
    dropout_seeds: Mapping[int, int] | None = None,
    step: int = 0,
) -> MicrobatchTensors:
    """Fill a layout with examples.

    Args:
        layout: Layout of one micro-batch.
        batches: Per task of the hTask, the examples of its global batch in this step.
        device: Device of the tensors.
        task_ids: Per task of the hTask; a stage finds the adapters under these names.
        attention: Backend that computes it.
        carried: Keys and values of its carry group, if sequences may spread over several micro-batches.
        earlier: Layouts of the carry group's micro-batches before this one.
        extras: Per task of the hTask, what its method puts in front of every sequence; by default nothing.
        dropout_seeds: Seed of each task of the hTask, by its index, that has dropout.
        step: Number of the optimizer step, on which masks of dropout depend.
    """
    tokens = np.zeros(layout.tokens, dtype=np.int64)
    positions = np.zeros(layout.tokens, dtype=np.int64)
    targets: dict[int, list[tuple[Segment, Example]]] = {span.task: [] for span in layout.spans}
    counting = np.arange(max((s.offset + s.row_tokens for s in layout.segments), default=0))
    for segment in layout.segments:
        in_front = extras[segment.task] if extras else NOTHING
        example = _behind(in_front.rows, batches[segment.task][segment.sequence])
        start, offset = segment.start, segment.offset
        tokens[start : start + segment.length] = example.tokens[offset : offset + segment.length]
        counted = counting[offset : offset + segment.row_tokens]
        if in_front.keys:  # a padded row may end behind the last position of the backbone
            counted = np.minimum(counted, offset + segment.length - 1) + in_front.keys
        positions[start : start + segment.row_tokens] = counted
        targets[segment.task].append((segment, example))
    rows: list[np.ndarray] = []
    ids: list[np.ndarray] = []
    target_spans: list[tuple[int, int]] = []
    seen = 0
    for span in layout.spans:
        before = seen
        for segment, example in targets[span.task]:
            # Positions of the part that predict a target; the last one's may be the first of the next part.
            first = max(segment.offset, example.target_start - 1)
            stop = max(first, min(segment.offset + segment.length, len(example.tokens) - 1))
            rows.append(np.arange(first, stop) + (segment.start - segment.offset))
            ids.append(example.tokens[first + 1 : stop + 1])
            seen += stop - first
        target_spans.append((before, seen))
    nothing = np.zeros(0, dtype=np.int64)
    return MicrobatchTensors(
        tokens_T=on_device(tokens, device),
        positions_T=on_device(positions, device),
        spans=layout.spans,
        task_ids=tuple(task_ids[span.task] for span in layout.spans),
        attention=build_attention_plan(
            layout.segments,
            layout.tokens,
            device,
            backend=attention,
            carried=carried,
            earlier=earlier,
            fronts=tuple(each.keys for each in extras),
        ),
        target_rows_N=on_device(np.concatenate([nothing, *rows]), device),
        target_ids_N=on_device(np.concatenate([nothing, *ids]), device),
        target_spans=tuple(target_spans),
        dropout_keys_T=_dropout_keys(layout, positions, dropout_seeds or {}, step, device),
    )


def _behind(rows: int, example: Example) -> Example:
    """An example behind the rows of virtual tokens, whose ids do not matter."""
    if not rows:
        return example
    virtual = np.zeros(rows, dtype=example.tokens.dtype)
    return Example(np.concatenate([virtual, example.tokens]), rows + example.target_start)


def _dropout_keys(
    layout: MicrobatchLayout,
    positions: NDArray[np.int64],
    seeds: Mapping[int, int],
    step: int,
    device: str,
) -> Tensor | None:
    """States of all tokens at once; None if no task of the micro-batch has dropout."""
    segments = [segment for segment in layout.segments if segment.task in seeds]
    if not segments:
        return None
    sequences = np.zeros(layout.tokens, dtype=np.uint64)
    for segment in segments:
        key = sequence_key(seeds[segment.task], step, segment.sequence)
        sequences[segment.start : segment.start + segment.length] = key
    return on_device(token_keys(sequences, positions).view(np.int64), device)
