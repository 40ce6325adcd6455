"""Chunks: how sequences are cut into them, and where their parts lie."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muxtune.batches import (
    HTaskShape,
    Piece,
    attention_calls,
    cut_chunks,
    layout_step,
    measure_shape,
    phase_tokens,
    phases,
    sequence_rows,
    share_chunks,
    step_group_tokens,
)
from muxtune.batches.chunks import count_chunks
from muxtune.support.errors import SpecError
from muxtune.tasks import Example, TaskData
from tests.muxtune.batches.carried import carried_attention_calls, carried_out_tokens
from tests.plans import make_task
from tests.sampling import examples

CHUNK = 16
LENGTHS = st.lists(st.integers(1, 5 * CHUNK), min_size=1, max_size=12)


@given(LENGTHS)
@settings(max_examples=examples(200))
def test_every_token_lies_once_in_a_chunk_behind_all_before_it(lengths):
    lengths = np.array(lengths, dtype=np.int64)
    chunks = cut_chunks(lengths, range(len(lengths)), CHUNK)
    assert len(chunks) == count_chunks(lengths, range(len(lengths)), CHUNK)
    assert all(0 < sum(part.length for part in parts) <= CHUNK for parts in chunks)
    for index, length in enumerate(lengths.tolist()):
        own = [part for parts in chunks for part in parts if part.sequence == index]
        assert [part.offset for part in own] == list(range(0, length, CHUNK))
        assert sum(part.length for part in own) == length
        assert all(part.length == CHUNK for part in own[:-1])


@given(LENGTHS)
@settings(max_examples=examples(200))
def test_no_two_shared_chunks_could_have_been_one(lengths):
    lengths = np.array(lengths, dtype=np.int64)
    chunks = cut_chunks(lengths, range(len(lengths)), CHUNK)
    loads = sorted(sum(part.length for part in parts) for parts in chunks)
    assert all(a + b > CHUNK for a, b in pairwise(loads))


def test_rests_share_a_chunk_that_follows_the_full_chunks_of_both():
    chunks = cut_chunks(np.array([14, 40, 35]), range(3), CHUNK)
    assert chunks == [
        [Piece(1, 0, 16)],
        [Piece(1, 16, 16)],
        [Piece(2, 0, 16)],
        [Piece(2, 16, 16)],
        [Piece(1, 32, 8), Piece(2, 32, 3)],
        [Piece(0, 0, 14)],
    ]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.integers(1, 4))
def test_micro_batches_of_a_group_take_equally_many_chunks_but_for_one(counts, microbatches):
    shares = list(share_chunks(counts, microbatches))
    assert [sum(share) for share in shares] == counts
    totals = [sum(share[k] for share in shares) for k in range(microbatches)]
    assert max(totals) - min(totals) <= 1
    assert min(min(share) for share in shares) >= 0


@st.composite
def htasks(draw):
    tasks = []
    for i in range(draw(st.integers(1, 3))):
        micro = draw(st.integers(1, 3))
        task = make_task(
            f"t{i}",
            max_length=5 * CHUNK,
            micro_batch_size=micro,
            global_batch_size=micro * draw(st.integers(1, 4)),
            steps=draw(st.integers(1, 3)),
        )
        tasks.append(TaskData(task, [Example(np.zeros(n, dtype=np.int64), 1) for n in draw(LENGTHS)]))
    return tasks


def steps_of(tasks, phase):
    """Lengths per task for the steps of a phase; those of a finished task are empty."""
    for step in phase:
        yield [
            data.batch_lengths(step) if step < data.task.steps else np.array([], dtype=np.int64)
            for data in tasks
        ]


def check_parts(layouts, lengths, carry):
    """Parts in chunks of their task, in the order of their sequence, in one carry group."""
    parts = {}
    for number, layout in enumerate(layouts):
        spans = {span.task: span for span in layout.spans}
        for segment in layout.segments:
            span = spans[segment.task]
            assert span.start <= segment.start
            assert segment.start + segment.length <= span.stop
            assert (segment.start - span.start) % CHUNK + segment.length <= CHUNK
            key = (segment.task, segment.sequence)
            parts.setdefault(key, []).append((segment.offset, number, segment.length, segment.after))
    assert set(parts) == {(task, i) for task, own in enumerate(lengths) for i in range(len(own))}
    for (task, sequence), own in parts.items():
        own.sort()
        assert [offset for offset, *_ in own] == list(range(0, lengths[task][sequence], CHUNK))
        assert all(offset + size + after == lengths[task][sequence] for offset, _, size, after in own)
        numbers = [number for _, number, *_ in own]
        assert numbers == sorted(numbers)
        assert len({number // carry for number in numbers}) == 1


@given(htasks(), st.sampled_from([1, 2, 4]))
@settings(max_examples=examples(80))
def test_parts_stay_in_a_carry_group_in_their_order_and_streams_are_as_short_as_they_allow(tasks, carry):
    shape = measure_shape(tasks, "chunk", chunk_tokens=CHUNK, carry=carry)
    assert shape.microbatches % carry == 0
    sizes = [step_group_tokens(data, "chunk", shape.carry_groups, CHUNK) for data in tasks]
    for phase in phases(tasks):
        tokens = phase_tokens(tasks, sizes, "chunk", phase, row_tokens=CHUNK, carry=carry)
        filled = 0
        for lengths in steps_of(tasks, phase):
            layouts = layout_step(shape, lengths, tokens=tokens)
            assert len(layouts) == shape.microbatches
            check_parts(layouts, lengths, carry)
            filled = max(filled, *(layout.spans[-1].stop for layout in layouts))
        assert filled == tokens


def test_attention_is_called_for_what_a_micro_batch_has_of_a_sequence():
    shape = HTaskShape(alignment="chunk", row_tokens=16, microbatches=2, tokens=48, carry=2)
    first, second = layout_step(shape, [np.array([90, 5])])
    rows = [
        [(row.carried, row.tokens, row.after) for row in sequence_rows(layout.segments)]
        for layout in (first, second)
    ]
    assert rows == [[(0, 48, 42)], [(48, 42, 0), (0, 5, 0)]]
    assert (attention_calls(first), carried_attention_calls(first)) == ([(1, 48)], [])
    assert (attention_calls(second), carried_attention_calls(second)) == ([(1, 16)], [(1, 48, 96)])
    assert (carried_out_tokens(first), carried_out_tokens(second)) == (48, 0)


def test_a_group_of_one_micro_batch_keeps_sequences_whole():
    shape = HTaskShape(alignment="chunk", row_tokens=16, microbatches=1, tokens=80)
    (layout,) = layout_step(shape, [np.array([70])])
    (row,) = sequence_rows(layout.segments)
    assert (row.carried, row.tokens, row.after) == (0, 70, 0)
    with pytest.raises(SpecError, match="tokens_per_microbatch = 64: expected at least 80"):
        layout_step(shape, [np.array([70])], tokens=64)
