"""The contest of attention backends, with a suite and a device whose times are known."""

import json

import pytest

from muxtune.graph.attention_backends import AttentionSuite, contest_streams
from muxtune.graph.operators import OPERATOR_SUITES
from muxtune.model import PRESETS
from profiler.attention import hold_contest
from profiler.rendezvous import Rendezvous, create_rendezvous
from runtime.operators import TorchOperators
from tests.profiler.fakes import CountingSuite, FakeDevice

MODEL = PRESETS["llama-tiny"]
MS_PER_TOKEN = {"grouped": 2.0, "loop": 1.5, "masked": 9.0}


class ThreeBackends(CountingSuite):
    """Attention takes so many milliseconds per token, backward twice as many."""

    def __init__(self, device, backend="grouped"):
        super().__init__(device)
        self.backend = backend

    def attention_needs(self, model, device):
        return {"grouped": None, "loop": None, "masked": None, "varlen": "a CUDA device"}

    def with_attention(self, backend):
        return ThreeBackends(self.device, backend)

    def build_attention(self, lengths, model, device):
        def take(ms_per_token):
            self.device.now_s += sum(lengths) * ms_per_token * 1e-3

        ms = MS_PER_TOKEN[self.backend]
        return {"fwd": lambda: take(ms), "bwd": lambda: take(2 * ms)}


def hold(tmp_path, device, *, ranks=1):
    create_rendezvous(tmp_path / "rendezvous", 1)
    rendezvous = Rendezvous(tmp_path / "rendezvous", 0, 1)
    suite = ThreeBackends(device)
    return hold_contest(
        suite, MODEL, device, rendezvous=rendezvous, ranks=ranks, folder=tmp_path, limit_s=0.1
    )


def test_every_backend_that_runs_is_timed_and_the_fastest_wins(tmp_path):
    contest = hold(tmp_path, FakeDevice())
    assert contest.chosen == "loop"
    assert contest.streams == contest_streams(MODEL.max_positions)
    times = {each.backend: each for each in contest.times}
    assert times["varlen"].missing == "a CUDA device"
    assert times["varlen"].fwd_s == ()
    for name, ms in MS_PER_TOKEN.items():
        assert times[name].fwd_s == pytest.approx([sum(each) * ms * 1e-3 for each in contest.streams])
        assert times[name].bwd_s == pytest.approx([sum(each) * ms * 2e-3 for each in contest.streams])
        assert contest.ratio(name) == pytest.approx(ms / 2)


def test_ranks_choose_by_the_median_over_all_of_them(tmp_path):
    """For this rank alone, ``loop`` is faster; two others have seen the opposite."""
    streams = contest_streams(MODEL.max_positions)
    for rank in (1, 2):
        figures = {"grouped": 1.0, "loop": 5.0, "masked": 9.0}
        seen = {name: [[s, s]] * len(streams) for name, s in figures.items()}
        (tmp_path / f"attention-{rank}.json").write_text(json.dumps(seen))
    contest = hold(tmp_path, FakeDevice(), ranks=3)
    assert contest.chosen == "grouped"


def test_the_runtimes_suite_takes_part_and_tries_only_what_keeps_tasks_apart():
    suite = OPERATOR_SUITES.get("torch")
    assert isinstance(suite, AttentionSuite)
    assert isinstance(suite, TorchOperators)
    needs = suite.attention_needs(MODEL, "cpu")
    assert {name for name, missing in needs.items() if missing is None} == {"grouped", "loop"}
    assert "NaN" in needs["masked"]
    assert not isinstance(CountingSuite(FakeDevice()), AttentionSuite)
