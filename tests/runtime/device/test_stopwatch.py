"""Moments on a host and on a GPU that is a list of times."""

from __future__ import annotations

import gc
import time

import numpy as np
import pytest

from runtime.device.stopwatch import EventMark, EventStopwatch, HostStopwatch


class FakeGpu:
    """Events pass in order, each at its time in seconds, once the GPU is told to work."""

    def __init__(self, times_s):
        self.times_s = list(times_s)
        self.made = 0
        self.passed = 0
        self.waits = 0

    def event(self):
        number, self.made = self.made, self.made + 1
        return FakeEvent(self, number)


class FakeEvent:
    def __init__(self, gpu, number):
        self.gpu, self.number, self.recorded = gpu, number, False

    @property
    def time_s(self):
        return self.gpu.times_s[self.number]

    def record(self):
        self.recorded = True

    def query(self):
        assert self.recorded
        return self.number < self.gpu.passed

    def synchronize(self):
        self.gpu.waits += self.number >= self.gpu.passed
        self.gpu.passed = max(self.gpu.passed, self.number + 1)

    def elapsed_time(self, end):
        assert self.query()  # torch refuses to read events that have not passed
        assert end.query()
        return float(np.float32((end.time_s - self.time_s) * 1e3))


def test_a_host_reads_its_clock():
    watch = HostStopwatch()
    origin_ns = time.perf_counter_ns()
    watch.begin(origin_ns)
    mark = watch.now()
    watch.settle()
    assert watch.has_passed(mark)
    assert watch.seconds(mark) == (mark - origin_ns) / 1e9 >= 0.0


def test_marks_of_a_gpu_are_read_when_they_have_passed_and_nothing_waits_for_them():
    gpu = FakeGpu([5.0, 5.5, 6.0, 8.0])
    watch = EventStopwatch(gpu.event, clock_ns=lambda: 3_000_000_000)
    watch.begin(origin_ns=1_000_000_000)  # two seconds ago; the GPU's own clock says 5 then
    marks = [watch.now() for _ in range(3)]
    gpu.passed = 2
    gpu.waits = 0
    watch.settle()
    assert [watch.has_passed(mark) for mark in marks] == [True, False, False]
    assert watch.seconds(marks[0]) == pytest.approx(2.5)
    assert gpu.waits == 0
    assert watch.seconds(marks[2]) == pytest.approx(5.0)  # asks for what has not passed
    assert gpu.waits > 0
    assert watch.seconds(marks[1]) == pytest.approx(3.0)


def test_a_long_run_keeps_its_microseconds():
    step_s = 0.012_345
    gpu = FakeGpu(step_s * i for i in range(300_001))  # one hour: a float32 has steps of 0.2 ms there
    watch = EventStopwatch(gpu.event, clock_ns=lambda: 0)
    watch.begin(origin_ns=0)
    mark = watch.now()
    for _ in range(299_999):
        before, mark = mark, watch.now()
        gpu.passed = gpu.made
        watch.settle()
    assert watch.seconds(mark) - watch.seconds(before) == pytest.approx(step_s, abs=1e-8)
    assert watch.seconds(mark) == pytest.approx(step_s * 300_000, abs=1e-3)


def test_events_that_have_been_read_are_let_go():
    gpu = FakeGpu(float(i) for i in range(100))
    watch = EventStopwatch(gpu.event, clock_ns=lambda: 0)
    watch.begin(origin_ns=0)
    for _ in range(90):
        watch.now()
    gpu.passed = 80
    watch.settle()
    assert len(watch._unread) == 11
    marks = [each for each in gc.get_objects() if type(each) is EventMark]
    assert len(marks) == 11  # nobody has kept the others


def test_events_of_several_streams_may_pass_out_of_order():
    gpu = FakeGpu([0.0, 4.0, 3.0, 5.0])
    watch = EventStopwatch(gpu.event, clock_ns=lambda: 0)
    watch.begin(origin_ns=0)
    marks = [watch.now() for _ in range(3)]
    gpu.passed = 4
    assert [watch.seconds(mark) for mark in marks] == pytest.approx([4.0, 3.0, 5.0])
