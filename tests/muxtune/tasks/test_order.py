"""Order of examples: torch's permutations for many epochs at once, and what of them a run takes."""

from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from muxtune.tasks.order import StepOrder, epoch_orders


@pytest.mark.parametrize("n", [1, 2, 3, 7, 40])
def test_hundreds_of_epochs_are_the_permutations_of_one_torch_generator(n):
    generator = torch.Generator().manual_seed(9)
    for order in islice(epoch_orders(n, 9, shuffle=True), 400):
        np.testing.assert_array_equal(order, torch.randperm(n, generator=generator).numpy())


@given(st.integers(1, 30), st.integers(1, 9), st.integers(1, 20), st.none() | st.integers(0, 2**63 - 1))
def test_steps_take_the_next_examples(n, batch, steps, seed):
    order = StepOrder(n, batch, steps, seed)
    epochs = epoch_orders(n, seed or 0, shuffle=seed is not None)
    whole = np.concatenate(list(islice(epochs, -(-steps * batch // n))))
    expected = whole[: steps * batch].reshape(steps, batch)
    np.testing.assert_array_equal(order.of(np.arange(steps)), expected)
    np.testing.assert_array_equal(order.of(steps - 1), expected[-1])
    np.testing.assert_array_equal(order.first(steps), expected.reshape(-1))
    np.testing.assert_array_equal(order.first(steps + 2)[: steps * batch], expected.reshape(-1))
    np.testing.assert_array_equal(order.times_used, np.bincount(expected.reshape(-1), minlength=n))
    np.testing.assert_array_equal(order.used, np.unique(expected))
    repeated = expected[np.arange(steps) % order.distinct_steps]
    np.testing.assert_array_equal(repeated, expected)


def test_a_long_run_in_file_order_takes_no_room():
    order = StepOrder(2048, 16, 10**9, None)
    assert order.distinct_steps == 128
    assert order.of(10**9 - 1).tolist() == order.of(127).tolist()
    assert order.times_used.sum() == 16 * 10**9
