from __future__ import annotations

import torch
from torch import nn

from runtime.memory import SavedBytes, parameter_bytes


def test_parameters_and_buffers_are_counted():
    module = nn.BatchNorm1d(10)  # two parameters and two buffers of 10 floats, a counter of int64
    assert parameter_bytes(module) == 4 * 10 * 4 + 8


def test_a_storage_counts_once_and_weights_do_not():
    linear = nn.Linear(8, 8, bias=False)
    x = torch.randn(5, 8, requires_grad=True)
    with SavedBytes(linear) as saved:
        y = linear(x)  # keeps x and, through a view, the weight
        x.view(-1).square()  # keeps x again
    assert saved.bytes == 5 * 8 * 4
    y.sum().backward()
    assert x.grad is not None


def test_nothing_is_counted_behind_the_block():
    x = torch.randn(5, requires_grad=True)
    with SavedBytes() as saved:
        x.square()
    x.exp()
    assert saved.bytes == 5 * 4
