"""Self times of nested events, and where a stretch of time begins and ends on the profiler's clock."""

from __future__ import annotations

import time
from dataclasses import dataclass

import pytest
import torch

from benchmarks.helpers.kernel_time import KernelTimes, self_times


@dataclass(frozen=True)
class Event:
    """As torch's profiler gives them."""

    label: str
    start: int
    end: int

    def name(self) -> str:
        return self.label

    def start_ns(self) -> int:
        return self.start

    def duration_ns(self) -> int:
        return self.end - self.start

    def device_resource_id(self) -> int:
        return 0


def test_an_event_counts_without_the_events_inside_of_it():
    events = [
        Event("aten::mm", 120, 160),
        Event("_LoraLinear", 100, 200),
        Event("aten::view", 105, 115),
        Event("aten::linear", 110 + 8, 165),  # around the product
        Event("aten::add", 300, 340),
    ]
    assert sorted(self_times(events)) == [
        (100, 100 - 10 - 47, ""),
        (105, 10, "bookkeeping"),
        (118, 47 - 40, "kernel"),
        (120, 40, "kernel"),
        (300, 40, "kernel"),
    ]


def test_events_that_begin_together_are_nested_by_length():
    events = [Event("aten::empty", 0, 10), Event("aten::zeros", 0, 30)]
    assert sorted(self_times(events)) == [(0, 10, "bookkeeping"), (0, 20, "kernel")]


def test_a_stretch_holds_the_kernels_that_ran_in_it():
    square = torch.ones(256, 256)
    with KernelTimes() as kernels:
        start_ns = time.perf_counter_ns()
        square.t() @ square
        middle_ns = time.perf_counter_ns()
        square.view(-1)
        end_ns = time.perf_counter_ns()
    product, view = kernels.between(start_ns, middle_ns), kernels.between(middle_ns, end_ns)
    assert 0 < product.kernel_s <= (middle_ns - start_ns) / 1e9
    assert product.bookkeeping_s > 0  # the transposition
    assert view.kernel_s == 0
    assert view.operators == 1
    assert kernels.between(start_ns, end_ns).kernel_s == pytest.approx(product.kernel_s)
