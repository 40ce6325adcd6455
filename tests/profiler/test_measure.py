"""One operator on one rank, with a suite that only counts."""

import os

import pytest

from muxtune.model import PRESETS
from muxtune.operators import Operator
from profiler.measure import measure_operator
from profiler.rendezvous import Rendezvous, create_rendezvous
from profiler.timing import CpuTimer

MODEL = PRESETS["llama-tiny"]


class CountingSuite:
    """Forward takes 2 ms on its clock, backward 4 ms."""

    def __init__(self):
        self.now_s = 0.0
        self.built = []
        self.forwards = 0
        self.timer = CpuTimer(lambda: self.now_s, lambda: self.now_s)

    def build(self, op, model, device, *, needs_backward=True):
        self.built.append((op, device))

        def forward():
            self.forwards += 1
            self.now_s += 2e-3

        def backward():
            assert self.forwards >= len(self.built), "a backward needs its forward before it"
            self.now_s += 4e-3

        return forward, backward if needs_backward else None


@pytest.fixture
def measure(tmp_path):
    create_rendezvous(tmp_path / "shared", 1)
    rendezvous = Rendezvous(tmp_path / "shared", 0, 1, os.getppid())

    def run(suite, op, device="cpu"):
        readings = measure_operator(
            op, MODEL, suite, device, timer=suite.timer, rendezvous=rendezvous, limit_s=0.1
        )
        return {phase: sample.median_s for phase, sample in readings}

    return run


def test_both_phases_are_timed(measure):
    assert measure(CountingSuite(), Operator("linear", (256, 688, 64))) == pytest.approx(
        {"fwd": 2e-3, "bwd": 4e-3}
    )


@pytest.mark.parametrize("op", [Operator("embedding", (64,)), Operator("optimizer", (4, 4096))], ids=str)
def test_some_kinds_have_no_backward(measure, op):
    assert list(measure(CountingSuite(), op)) == ["fwd"]


@pytest.mark.parametrize(
    ("op", "device", "copies"),
    [
        (Operator("linear", (256, 688, 64)), "cpu", 4),  # 1 MB: its weights would stay in the cache
        (Operator("linear", (256, 688, 4096)), "cpu", 1),  # 16 MB: more than the cache by itself
        (Operator("stage", (3, 1, 8, 1, 64)), "cpu", 1),
        (Operator("linear", (256, 688, 64)), "cuda:0", 1),  # its timer empties the cache
    ],
    ids=str,
)
def test_small_operators_are_built_several_times(measure, op, device, copies):
    suite = CountingSuite()
    measure(suite, op, device)
    assert suite.built == [(op, device)] * copies
