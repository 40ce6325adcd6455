"""The timing loop with a clock that only moves when it is told to."""

import numpy as np
import pytest

from profiler.timing import (
    MIN_REPETITIONS,
    RELATIVE_ERROR,
    CpuTimer,
    Sample,
    WallTimer,
    median_error,
    merge_samples,
    time_repeatedly,
)


class FakeMachine:
    """Wall and processor clock; ``work`` advances both, ``wait`` the wall clock alone."""

    def __init__(self):
        self.wall_s = 100.0
        self.processor_s = 7.0
        self.timer = CpuTimer(lambda: self.wall_s, lambda: self.processor_s)

    def work(self, seconds):
        self.wall_s += seconds
        self.processor_s += seconds

    def wait(self, seconds):
        self.wall_s += seconds


def test_steady_calls_are_known_after_the_fewest_repetitions():
    machine = FakeMachine()
    [sample] = time_repeatedly([[lambda: machine.work(1e-3)]], machine.timer, limit_s=10.0)
    assert sample.repetitions == MIN_REPETITIONS
    assert sample.median_s == pytest.approx(1e-3)


def test_spread_is_repeated_until_the_median_is_known():
    machine = FakeMachine()
    generator = np.random.default_rng(0)
    taken = []

    def call():
        taken.append(1e-3 * (1 + abs(generator.normal(0, 0.3))))
        machine.work(taken[-1])

    [sample] = time_repeatedly([[call]], machine.timer, limit_s=100.0)
    assert sample.repetitions > 50
    timed = taken[-sample.repetitions :]
    assert median_error(timed) <= RELATIVE_ERROR
    assert sample.median_s == pytest.approx(np.median(timed))
    assert sample.p10_s < sample.median_s < sample.p90_s


def test_the_limit_ends_a_hopeless_measurement():
    machine = FakeMachine()
    generator = np.random.default_rng(0)
    start_s = machine.wall_s
    call = lambda: machine.work(0.01 * generator.lognormal(0, 3))  # noqa: E731
    [sample] = time_repeatedly([[call]], machine.timer, limit_s=1.0)
    assert sample.repetitions >= MIN_REPETITIONS
    assert median_error([sample.p10_s, sample.median_s, sample.p90_s]) > RELATIVE_ERROR
    assert machine.wall_s - start_s > 1.0


def test_long_calls_stop_at_the_limit_but_not_before_five():
    machine = FakeMachine()
    durations = iter(np.tile([1.0, 2.0], 100))
    [sample] = time_repeatedly([[lambda: machine.work(next(durations))]], machine.timer, limit_s=1.0)
    assert sample.repetitions == MIN_REPETITIONS


def test_copies_take_turns_and_are_all_warm():
    machine = FakeMachine()
    calls = []

    def make(name):
        def call():
            calls.append(name)
            machine.work(1e-3)

        return call

    time_repeatedly([[make(name)] for name in "abcd"], machine.timer, limit_s=1.0)
    assert "".join(calls).startswith("abcdabcda")


def test_calls_of_a_copy_follow_each_other_and_are_timed_one_by_one():
    machine = FakeMachine()
    order = []

    def make(name, seconds):
        def call():
            order.append(name)
            machine.work(seconds)

        return call

    copies = [[make("f", 1e-3), make("b", 3e-3)], [make("F", 1e-3), make("B", 3e-3)]]
    forward, backward = time_repeatedly(copies, machine.timer, limit_s=1.0)
    warm_up, timed = order[:6], order[6:]
    assert "".join(warm_up) == "fbFBfb"
    assert "".join(timed).startswith("fbFBfb")
    assert (forward.median_s, backward.median_s) == pytest.approx((1e-3, 3e-3))
    assert forward.repetitions == backward.repetitions


def test_time_that_others_had_the_core_does_not_count():
    machine = FakeMachine()

    def preempted():
        machine.work(1e-3)
        machine.wait(4e-3)

    assert machine.timer.call_s(preempted) == pytest.approx(1e-3)


def test_waiting_for_other_ranks_counts():
    machine = FakeMachine()

    def receive():
        machine.work(1e-3)
        machine.wait(4e-3)

    timer = WallTimer(lambda: machine.wall_s)
    assert timer.call_s(receive) == pytest.approx(5e-3)
    assert timer.now_s() == machine.wall_s


def test_helper_threads_do_not_lengthen_a_call():
    machine = FakeMachine()

    def two_threads():
        machine.work(1e-3)
        machine.processor_s += 1e-3

    assert machine.timer.call_s(two_threads) == pytest.approx(1e-3)


def test_merged_samples_are_medians_of_ranks():
    merged = merge_samples([Sample(1.0, 0.9, 1.1, 10), Sample(2.0, 1.9, 2.1, 20), Sample(9.0, 1.0, 50.0, 5)])
    assert merged == Sample(2.0, 1.0, 2.1, 35)
