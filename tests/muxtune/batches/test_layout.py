"""Alignment: where the sequences of a step lie, for every task, step and strategy."""

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muxtune.batches import (
    PACKED_MULTIPLE,
    HTaskShape,
    attention_calls,
    deal_sequences,
    group_by_length,
    largest_stream,
    layout_step,
    measure_shape,
    phase_tokens,
    phases,
    place_groups,
    row_slots,
    step_group_tokens,
)
from muxtune.batches.chunks import pack_chunks
from muxtune.support.errors import SpecError
from muxtune.tasks import Example, TaskData
from tests.plans import make_task
from tests.sampling import examples

ALIGNMENTS = ("pad", "pack", "chunk")
CHUNK_TOKENS = 64
EXAMPLES = examples(60)


@st.composite
def task_datas(draw, name="t"):
    max_length = draw(st.integers(2, CHUNK_TOKENS))
    micro = draw(st.integers(1, 4))
    task = make_task(
        name,
        max_length=max_length,
        micro_batch_size=micro,
        global_batch_size=micro * draw(st.integers(1, 4)),
        steps=draw(st.integers(1, 4)),
        shuffle=draw(st.booleans()),
        seed=draw(st.integers(0, 9)),
    )
    lengths = draw(st.lists(st.integers(1, max_length), min_size=1, max_size=20))
    return TaskData(task, [Example(np.zeros(n, dtype=np.int64), min(1, n)) for n in lengths])


@st.composite
def htasks(draw):
    return [draw(task_datas(f"t{i}")) for i in range(draw(st.integers(1, 4)))]


def shape_of(tasks, alignment, **kwargs):
    chunk_tokens = CHUNK_TOKENS if alignment == "chunk" else None
    return measure_shape(tasks, alignment, chunk_tokens=chunk_tokens, **kwargs)


def layouts_of(tasks, shape):
    """Lengths per task and layouts of every step, each with the length of the stream in its phase."""
    sizes = [step_group_tokens(d, shape.alignment, shape.microbatches, shape.row_tokens) for d in tasks]
    for phase in phases(tasks):
        tokens = phase_tokens(tasks, sizes, shape.alignment, phase)
        for step in phase:
            lengths = list(steps_of(tasks))[step]
            yield lengths, tokens, layout_step(shape, lengths, tokens=tokens)


def steps_of(tasks):
    """Lengths per task for every step; those of a finished task are empty."""
    for step in range(max(data.task.steps for data in tasks)):
        yield [
            data.batch_lengths(step) if step < data.task.steps else np.array([], dtype=np.int64)
            for data in tasks
        ]


@pytest.mark.parametrize("alignment", ALIGNMENTS)
@given(tasks=htasks())
@settings(max_examples=EXAMPLES)
def test_every_sequence_lies_once_in_its_tasks_span_and_overlaps_no_other(alignment, tasks):
    shape = shape_of(tasks, alignment)
    for lengths, _, layouts in layouts_of(tasks, shape):
        assert len(layouts) == shape.microbatches
        placed = Counter((s.task, s.sequence) for layout in layouts for s in layout.segments)
        assert placed == Counter((t, i) for t, each in enumerate(lengths) for i in range(len(each)))
        for layout in layouts:
            spans = {span.task: span for span in layout.spans}
            for segment in layout.segments:
                assert segment.length == lengths[segment.task][segment.sequence] <= segment.row_tokens
                span = spans[segment.task]
                assert span.start <= segment.start
                assert segment.start + segment.row_tokens <= span.stop
            by_start = sorted(layout.segments, key=lambda s: s.start)
            assert all(a.start + a.row_tokens <= b.start for a, b in pairwise(by_start))


@pytest.mark.parametrize("alignment", ALIGNMENTS)
@given(tasks=htasks())
@settings(max_examples=EXAMPLES)
def test_token_counts_are_static_and_finished_tasks_vanish(alignment, tasks):
    shape = shape_of(tasks, alignment)
    for lengths, tokens, layouts in layouts_of(tasks, shape):
        running = [t for t, each in enumerate(lengths) if len(each)]
        assert tokens == shape.tokens or len(running) < len(tasks)
        for layout in layouts:
            assert [span.task for span in layout.spans] == running
            assert [0, *(span.stop for span in layout.spans)][:-1] == [span.start for span in layout.spans]
            assert layout.spans[-1].stop <= layout.tokens == tokens
            assert layout.effective_tokens == sum(s.length for s in layout.segments)


@pytest.mark.parametrize("alignment", ALIGNMENTS)
@given(tasks=htasks())
@settings(max_examples=EXAMPLES)
def test_no_task_gets_more_sequences_at_once_than_it_declared(alignment, tasks):
    shape = shape_of(tasks, alignment)
    assert shape.microbatches == max(d.task.global_batch_size // d.task.micro_batch_size for d in tasks)
    for _, _, layouts in layouts_of(tasks, shape):
        for layout in layouts:
            for task, count in Counter(s.task for s in layout.segments).items():
                assert count <= tasks[task].task.micro_batch_size


@given(htasks())
@settings(max_examples=EXAMPLES)
def test_a_chunk_belongs_to_one_task_and_no_sequence_crosses_its_end(tasks):
    shape = shape_of(tasks, "chunk")
    assert shape.tokens % CHUNK_TOKENS == 0
    for _, _, layouts in layouts_of(tasks, shape):
        for layout in layouts:
            assert all(span.start % CHUNK_TOKENS == 0 for span in layout.spans)
            for segment in layout.segments:
                assert segment.start // CHUNK_TOKENS == (segment.start + segment.length - 1) // CHUNK_TOKENS
                assert segment.row_tokens == segment.length


@given(htasks())
@settings(max_examples=EXAMPLES)
def test_rows_of_pad_are_as_long_as_the_longest_declared_length(tasks):
    shape = shape_of(tasks, "pad")
    row = max(data.task.max_length for data in tasks)
    assert shape.row_tokens == row
    for _, _, layouts in layouts_of(tasks, shape):
        for layout in layouts:
            assert all((s.row_tokens, s.start % row) == (row, 0) for s in layout.segments)


@pytest.mark.parametrize("alignment", ALIGNMENTS)
@given(tasks=htasks())
@settings(max_examples=EXAMPLES)
def test_the_stream_is_the_shortest_that_holds_every_step(alignment, tasks):
    shape = shape_of(tasks, alignment)
    for phase in phases(tasks):
        both = [
            (tokens, layouts)
            for step, (_, tokens, layouts) in enumerate(layouts_of(tasks, shape))
            if step in phase
        ]
        fullest = max(layout.spans[-1].stop for _, layouts in both for layout in layouts)
        granule = PACKED_MULTIPLE if alignment == "pack" else 1
        assert {tokens for tokens, _ in both} == {math.ceil(fullest / granule) * granule}


@given(htasks())
@settings(max_examples=EXAMPLES)
def test_groups_of_pack_are_the_smallest_and_a_chunk_of_the_row_length_takes_no_more_than_pad(tasks):
    row = max(data.task.max_length for data in tasks)
    for data in tasks:
        m = data.task.declared_microbatches
        pack, chunk = step_group_tokens(data, "pack", m, None), step_group_tokens(data, "chunk", m, row)
        assert (pack <= chunk).all()
        assert (chunk.max(axis=1) <= step_group_tokens(data, "pad", m, row).max(axis=1)).all()


@st.composite
def group_sizes(draw):
    steps, m = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    sizes = st.lists(st.integers(0, 50), min_size=steps * m, max_size=steps * m)
    return [np.array(draw(sizes)).reshape(steps, m) for _ in range(draw(st.integers(1, 4)))]


@given(group_sizes(), st.sampled_from(ALIGNMENTS))
@settings(max_examples=examples(200))
def test_every_group_of_every_task_goes_into_one_micro_batch(sizes, alignment):
    m = sizes[0].shape[1]
    for placed in place_groups(sizes, alignment):
        assert (np.sort(placed, axis=1) == np.arange(m)).all()
        assert alignment != "pad" or (placed == np.arange(m)).all()


@given(group_sizes())
@settings(max_examples=examples(200))
def test_streams_differ_by_at_most_the_largest_spread_of_a_task(sizes):
    placed = place_groups(sizes, "pack")
    filled = sum(np.take_along_axis(s, p, axis=1) for s, p in zip(sizes, placed, strict=True))
    spread = max(int((s.max(axis=1) - s.min(axis=1)).max()) for s in sizes)
    assert (filled.max(axis=1) - filled.min(axis=1) <= spread).all()
    assert largest_stream(sizes, range(len(filled))) == filled.max()


@given(st.lists(st.integers(1, 99), min_size=1, max_size=40), st.integers(1, 12), st.sampled_from(ALIGNMENTS))
@settings(max_examples=examples(300))
def test_sequences_are_divided_evenly_and_deterministically(lengths, microbatches, alignment):
    lengths = np.array(lengths)
    groups = deal_sequences(lengths, alignment, microbatches)
    assert len(groups) == microbatches
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    assert all(group == sorted(group) for group in groups)
    assert max(map(len, groups)) <= math.ceil(len(lengths) / microbatches)
    assert groups == deal_sequences(lengths.copy(), alignment, microbatches)
    if alignment == "pad":
        assert [i for group in groups for i in group] == list(range(len(lengths)))


def test_equal_sequences_beside_one_long_one_are_evened_out():
    lengths = np.array([10, 10, 10, 40])
    assert deal_sequences(lengths, "pack", 2) == [[2, 3], [0, 1]]
    assert deal_sequences(np.array([40, 10, 40, 10]), "pack", 2) == [[0, 3], [1, 2]]


@given(st.lists(st.integers(1, CHUNK_TOKENS), max_size=30))
@settings(max_examples=examples(200))
def test_no_two_chunks_could_have_been_one(lengths):
    lengths = np.array(lengths, dtype=np.int64)
    bins = pack_chunks(lengths, range(len(lengths)), CHUNK_TOKENS)
    assert sorted(i for content in bins for i in content) == list(range(len(lengths)))
    loads = [int(lengths[content].sum()) for content in bins]
    assert all(0 < load <= CHUNK_TOKENS for load in loads)
    assert all(a + b > CHUNK_TOKENS for a, b in pairwise(sorted(loads)))


@pytest.mark.parametrize(
    ("alignment", "row_tokens", "tokens", "lengths", "message"),
    [
        ("pack", None, 30, [16, 15], "tokens_per_microbatch = 30: expected at least 31"),
        ("chunk", 16, 16, [16, 1], "tokens_per_microbatch = 16: expected at least 32"),
        ("pad", 16, 16, [16, 1], "tokens_per_microbatch = 16: expected at least 32"),
        ("pad", 16, 32, [17, 1], r"row_tokens = 16: expected at least the longest sequence \(17 tokens\)"),
        ("chunk", 16, 32, [33, 16], "tokens_per_microbatch = 32: expected at least 64"),
    ],
)
def test_sequences_that_do_not_fit_the_plan_are_refused(alignment, row_tokens, tokens, lengths, message):
    shape = HTaskShape(alignment=alignment, row_tokens=row_tokens, microbatches=1, tokens=tokens)
    with pytest.raises(SpecError, match=message):
        layout_step(shape, [np.array(lengths)])


def test_the_three_strategies_on_an_example_small_enough_to_draw():
    def starts(alignment, row_tokens, tokens):
        shape = HTaskShape(alignment=alignment, row_tokens=row_tokens, microbatches=1, tokens=tokens)
        (layout,) = layout_step(shape, [np.array([4, 7, 10])])
        return {s.sequence: s.start for s in layout.segments}

    assert starts("pad", 12, 36) == {0: 0, 1: 12, 2: 24}
    assert starts("pack", None, 21) == {0: 0, 1: 4, 2: 11}
    assert starts("chunk", 12, 24) == {2: 0, 1: 12, 0: 19}  # longest first; 7 and 4 share the second chunk


def test_attention_rows_are_filled_up_to_a_multiple_of_16():
    assert [row_slots(n) for n in (1, 16, 17, 63, 64)] == [16, 16, 32, 64, 64]
    shape = HTaskShape(alignment="pack", row_tokens=None, microbatches=1, tokens=120)
    (layout,) = layout_step(shape, [np.array([50, 46, 9, 10])])
    assert attention_calls(layout) == [(2, 64), (2, 16)]


@given(st.lists(st.integers(1, 300), max_size=60))
@settings(max_examples=examples(300))
def test_attention_groups_cover_every_index_once_and_hold_near_equal_lengths(lengths):
    groups = group_by_length(lengths)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        own = [lengths[i] for i in group]
        assert own == sorted(own, reverse=True)
        assert all(n >= 0.75 * own[0] or n >= own[0] - 8 for n in own)
    for group, following in pairwise(groups):
        longest, first_left_out = lengths[group[0]], lengths[following[0]]
        assert first_left_out < 0.75 * longest  # else it would have joined
        assert first_left_out < longest - 8
