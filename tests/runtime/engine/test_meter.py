"""What is metered of a stage's actions, and what not."""

from __future__ import annotations

import pytest
import torch

from muxtune.schedule import Action
from runtime.engine.meter import ActionMeter


def _play(meter: ActionMeter, number: int, size: int) -> None:
    x = torch.ones(size, requires_grad=True)
    with meter.forward(Action("F", 0, number), torch.nn.Identity()) as counted:
        y = (x * 2).square()  # keeps the product
        if counted is not None:
            counted.hold(y)
    with meter.backward(Action("B", 0, number)):
        y.sum().backward()


def test_every_micro_batch_of_the_first_step_is_counted_and_later_ones_are_not():
    meter = ActionMeter([2])
    for number, size in enumerate((10, 30, 70, 70)):
        _play(meter, number, size)
    assert dict(meter.seen.kept) == {(0, 0): 2 * 10 * 4, (0, 1): 2 * 30 * 4}


def test_more_steps_on_request():
    meter = ActionMeter([2], steps=2)
    for number, size in enumerate((10, 30, 70, 80, 90)):
        _play(meter, number, size)
    assert [n for _, n in meter.seen.kept] == [0, 1, 2, 3]


def test_temporaries_are_those_of_the_first_micro_batch():
    meter = ActionMeter([2])
    _play(meter, 0, 1000)
    seen = meter.seen
    assert seen.forward_workspace == {0: 0}  # everything that the forward made is kept
    assert 4000 <= seen.backward_workspace[0] <= 3 * 4000 + 100
    _play(meter, 1, 50_000)
    assert meter.seen.backward_workspace == seen.backward_workspace


def test_what_the_first_backward_frees_is_known_whichever_micro_batch_it_is_of():
    """As in a carry group, whose last micro-batch goes back first."""

    def backward_bytes(opened: int) -> int:
        meter = ActionMeter([opened])
        x = torch.ones(1000, requires_grad=True)
        for number in range(opened):
            with meter.forward(Action("F", 0, number), torch.nn.Identity()):
                y = x
                for _ in range(10):
                    y = (y * 2).square()
        loss = y.sum()
        del y
        with meter.backward(Action("B", 0, opened - 1)):
            loss.backward()
        return meter.seen.backward_workspace[0]

    assert backward_bytes(1) < 5 * 4000
    assert backward_bytes(3) == pytest.approx(backward_bytes(1), abs=100)
