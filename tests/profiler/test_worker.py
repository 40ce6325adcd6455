"""One measuring process from the inside, with a device that counts."""

import pytest

from muxtune.costs.profile import ClockReading
from muxtune.graph.attention_backends import AttentionContest
from muxtune.graph.operators import OPERATOR_SUITES
from muxtune.model import PRESETS
from profiler.devices import Description
from profiler.jobs import Job
from profiler.load import ProcessorShare
from profiler.rendezvous import create_rendezvous
from profiler.worker import RENDEZVOUS, measure_job
from profiler.worker_protocol import Reading
from tests.profiler.fakes import CountingSuite, FakeDevice
from tests.profiler.test_attention import ThreeBackends

OPERATORS = (("norm", (64,)), ("embedding", (64,)), ("norm", (64,)))


@pytest.fixture
def say_all(monkeypatch, tmp_path):
    """What a process says that measures ``OPERATORS`` with a suite that counts."""

    def run(device, *, ranks=1, suite=None, **options):
        suite = suite or CountingSuite(device)
        monkeypatch.setattr(OPERATOR_SUITES, "get", lambda name: suite)
        create_rendezvous(tmp_path / RENDEZVOUS, ranks)
        job = Job(
            model=PRESETS["llama-tiny"],
            device="fake",
            suite="counting",
            ranks=ranks,
            operators=OPERATORS,
            link_ranks=0,
            links=(),
            limit_s=0.1,
            **options,
        )
        said = []
        measure_job(job, device, tmp_path, said.append)
        return said

    return run


def test_it_describes_its_device_and_reads_the_clocks_around_the_measurement(say_all):
    device = FakeDevice()
    said = say_all(device)
    assert [type(line) for line in said] == [
        *(Description, ClockReading),
        *[Reading] * 5,
        *(ProcessorShare, ClockReading),
    ]
    assert [line.moment for line in said if isinstance(line, ClockReading)] == ["before", "after"]
    readings = [(line.op.kind, line.phase) for line in said if isinstance(line, Reading)]
    assert readings == [
        *(("norm", "fwd"), ("norm", "bwd")),
        ("embedding", "fwd"),
        *(("norm", "fwd"), ("norm", "bwd")),
    ]
    assert device.timer.calls > 5 * len(readings)


def test_only_rank_0_describes_the_device(say_all):
    said = say_all(FakeDevice(rank=1), ranks=1)  # beyond the measuring ranks
    assert [type(line) for line in said] == [ClockReading, ClockReading]
    assert {line.rank for line in said} == {1}


def test_it_tells_what_it_had_of_its_core(say_all):
    device = FakeDevice()
    (share,) = (line for line in say_all(device) if isinstance(line, ProcessorShare))
    assert share.rank == 0
    assert share.computed_s == share.elapsed_s == pytest.approx(device.now_s)


def test_attention_that_is_chosen_does_not_compete_again(say_all):
    device = FakeDevice()
    said = say_all(device, suite=ThreeBackends(device), attention="loop")
    assert not [line for line in said if isinstance(line, AttentionContest)]


def test_operators_are_measured_with_the_attention_that_has_won(say_all):
    device, built = FakeDevice(), []

    class Recording(ThreeBackends):
        def with_attention(self, backend):
            return Recording(self.device, backend)

        def build(self, op, model, device, *, needs_backward=True):
            built.append(self.backend)
            return super().build(op, model, device, needs_backward=needs_backward)

    said = say_all(device, suite=Recording(device))
    (contest,) = (line for line in said if isinstance(line, AttentionContest))
    assert contest.chosen == "loop"
    assert set(built) == {"loop"}
