"""Many steps at once against the layout of each step, on drawn, real and made-up lengths."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxtune.batches import (
    dealing,
    largest_stream,
    place_groups,
)
from tests.muxtune.batches.data import make_data, real_lengths


@given(st.data(), st.integers(1, 6), st.integers(0, 30), st.integers(1, 60))
def test_the_fullest_stream_is_that_of_all_steps_laid_out(data, groups, first, steps):
    count = data.draw(st.integers(1, 4))
    sizes = []
    for _ in range(count):
        rows = data.draw(st.integers(1, 12))
        values = st.lists(st.integers(0, 40), min_size=rows * groups, max_size=rows * groups)
        sizes.append(np.array(data.draw(values)).reshape(rows, groups))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dealing, "_LAID_OUT", 3)
        fullest = largest_stream(sizes, range(first, first + steps))
    whole = [each[(first + np.arange(steps)) % len(each)] for each in sizes]
    placed = place_groups(whole, "pack")
    filled = sum(np.take_along_axis(s, p, axis=1) for s, p in zip(whole, placed, strict=True))
    assert fullest == filled.max()


@pytest.mark.parametrize("shuffle", [False, True])
def test_means_over_all_steps_are_those_of_each_step(shuffle):
    data = make_data(real_lengths("rte", 37, 5), batch=5, steps=101, shuffle=shuffle)
    each = [int(data.batch_lengths(step).sum()) for step in range(101)]
    assert data.step_tokens == pytest.approx(np.mean(each), rel=1e-12)
    assert data.mean_length == pytest.approx(np.mean(each) / 5, rel=1e-12)
    assert data.longest == max(int(data.batch_lengths(step).max()) for step in range(101))


def test_what_no_step_takes_counts_for_nothing():
    data = make_data([3, 4, 500, 500], batch=1, steps=2)
    assert (data.longest, data.mean_length, data.distinct_steps) == (4, 3.5, 2)
