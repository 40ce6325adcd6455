"""Static shapes hold every step of a run, and no task changes another's groups."""

from math import lcm

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxtune.batches import (
    deal_sequences,
    group_tokens,
    measure_shape,
    phase_tokens,
    phases,
    place_groups,
    shapes,
    step_group_tokens,
)
from muxtune.support.errors import SpecError
from tests.muxtune.batches.data import make_data, real_lengths, sizes_of_each_step


@given(
    st.lists(st.integers(1, 80), min_size=1, max_size=30),
    st.integers(1, 12),
    st.integers(1, 40),
    st.integers(1, 14),
    st.booleans(),
    st.sampled_from([("pad", 80), ("pack", None), ("chunk", 16), ("chunk", 7), ("chunk", 128)]),
)
def test_groups_of_all_steps_are_those_of_each(lengths, batch, steps, microbatches, shuffle, layout):
    data = make_data(lengths, batch=batch, steps=steps, shuffle=shuffle)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, "_SEQUENCES_AT_ONCE", 20)
        sizes = step_group_tokens(data, layout[0], microbatches, layout[1])
    expected = sizes_of_each_step(data, layout[0], microbatches, layout[1])
    # Which group has which sequences is nobody's business here.
    repeated = sizes[np.arange(steps) % len(sizes)]
    np.testing.assert_array_equal(np.sort(repeated, axis=1), np.sort(expected, axis=1))


def test_a_row_that_is_too_short_is_refused():
    with pytest.raises(
        SpecError, match=r"row_tokens = 8: expected at least the longest sequence \(9 tokens\)"
    ):
        step_group_tokens(make_data([3, 9]), "pad", 2, 8)


@pytest.mark.parametrize(("alignment", "row"), [("pad", None), ("pack", None), ("chunk", 64), ("chunk", 256)])
def test_shapes_of_long_runs_hold_every_step_of_tasks_that_do_not_repeat_together(alignment, row):
    tasks = [
        make_data(real_lengths("sst2", 251, 1), batch=16, micro=4, steps=3000, max_length=256),
        make_data(real_lengths("rte", 1021, 2), batch=6, micro=3, steps=2500, max_length=256),
        make_data(
            real_lengths("openbookqa", 300, 3), batch=8, micro=2, steps=3500, shuffle=True, max_length=256
        ),
    ]
    assert lcm(*(data.distinct_steps for data in tasks)) > 3500
    shape = measure_shape(tasks, alignment, chunk_tokens=row)
    shared = range(2500)
    sizes = [
        sizes_of_each_step(data, alignment, shape.microbatches, shape.row_tokens)[: len(shared)]
        for data in tasks
    ]
    placed = place_groups(sizes, alignment)
    filled = sum(np.take_along_axis(s, p, axis=1) for s, p in zip(sizes, placed, strict=True))
    fullest = int(np.max(filled))
    assert shape.tokens == (-(-fullest // 8) * 8 if alignment == "pack" else fullest)


def test_later_phases_hold_the_tasks_that_still_train():
    tasks = [make_data([9, 1, 5], batch=2, steps=4), make_data([7, 2, 8, 30], batch=3, steps=9)]
    sizes = [step_group_tokens(data, "pack", 2, None) for data in tasks]
    found = [phase_tokens(tasks, sizes, "pack", phase) for phase in phases(tasks)]
    last = max(
        max(group_tokens(each, deal_sequences(each, "pack", 2), "pack", None))
        for each in (tasks[1].batch_lengths(step) for step in range(4, 9))
    )
    assert found[1] == -(-last // 8) * 8
