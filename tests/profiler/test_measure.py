"""One operator on one rank, with a device and a suite that only count."""

import pytest

from muxtune.costs.operator_work import operator_work
from muxtune.graph.operators import Operator
from muxtune.model import PRESETS
from profiler.measure import measure_operator
from profiler.rendezvous import Rendezvous, create_rendezvous
from tests.profiler.fakes import CountingSuite, FakeDevice

MODEL = PRESETS["llama-tiny"]
LINEAR = Operator("linear", (256, 688, 64))


@pytest.fixture
def measure(tmp_path):
    create_rendezvous(tmp_path / "shared", 1)
    rendezvous = Rendezvous(tmp_path / "shared", 0, 1)

    def run(suite, op):
        readings = measure_operator(op, MODEL, suite, suite.device, rendezvous=rendezvous, limit_s=0.1)
        return {phase: sample.median_s for phase, sample in readings}

    return run


def test_both_phases_are_timed_by_the_devices_timer(measure):
    suite = CountingSuite(FakeDevice())
    assert measure(suite, LINEAR) == pytest.approx({"fwd": 2e-3, "bwd": 4e-3})
    assert suite.device.timer.calls == len(suite.order)


def test_a_stage_goes_forward_and_backward_in_turn(measure):
    suite = CountingSuite(FakeDevice(copies=4))
    assert measure(suite, Operator("stage", (1, 1, 8, 1, 16))) == pytest.approx({"fwd": 2e-3, "bwd": 4e-3})
    assert "FF" not in suite.order
    assert "BB" not in suite.order
    assert len(suite.built) == 1  # its layers take turns by themselves


@pytest.mark.parametrize("op", [Operator("embedding", (64,)), Operator("optimizer", (4, 4096))], ids=str)
def test_some_kinds_have_no_backward(measure, op):
    assert list(measure(CountingSuite(FakeDevice()), op)) == ["fwd"]


@pytest.mark.parametrize("copies", [1, 4])
def test_the_device_says_how_many_copies_take_turns(measure, copies):
    suite = CountingSuite(FakeDevice(copies=copies))
    measure(suite, LINEAR)
    assert suite.built == [(LINEAR, "cpu")] * copies
    assert suite.device.asked_bytes == [operator_work(LINEAR, "fwd", MODEL).bytes]
