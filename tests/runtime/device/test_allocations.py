from __future__ import annotations

import torch
from torch import nn

from runtime.backbone.held_bytes import parameter_bytes
from runtime.device.allocations import AllocationTrace, SavedBytes


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


def test_held_tensors_count_like_saved_ones_and_nothing_stays_behind():
    x = torch.randn(5, requires_grad=True)
    with SavedBytes() as saved:
        y = x.square()  # saves x
        saved.hold(x, y, None)
    assert saved.bytes == 2 * 5 * 4
    watched = y.untyped_storage()._weak_ref()
    del y
    assert torch.UntypedStorage._expired(watched)  # without a garbage collection
    torch.UntypedStorage._free_weak_ref(watched)


def test_an_allocation_trace_sees_temporaries_come_and_go():
    x = torch.ones(1000)
    with AllocationTrace() as trace:
        y = x.exp().exp()  # the inner one lives until the outer one is there
    assert (trace.peak_bytes, trace.net_bytes) == (8000, 4000)
    with AllocationTrace() as trace:
        del y
        x.exp()
    assert (trace.peak_bytes, trace.net_bytes) == (0, -4000)


def test_an_allocation_trace_inside_of_another_profile_stays_off():
    with torch.autograd.profiler.profile(use_cpu=True), AllocationTrace() as trace:
        torch.ones(1000)
    assert (trace.peak_bytes, trace.net_bytes) == (0, 0)
