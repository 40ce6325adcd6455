"""A busy machine is told before and after."""

import os

import pytest

from profiler.load import ProcessorShare, busy_machine, taken_cores


@pytest.mark.parametrize(
    ("load", "cores", "ranks", "told"),
    [(0.1, 2, 2, False), (0.9, 2, 2, True), (1.2, 4, 2, False), (3.0, 4, 2, True), (0.2, 1, 2, False)],
)
def test_a_load_that_leaves_no_core_for_each_rank_is_told(monkeypatch, load, cores, ranks, told):
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 9.0, 9.0))
    monkeypatch.setattr("profiler.load.usable_cores", lambda: cores)
    warning = busy_machine(ranks)
    assert (warning is not None) == told
    if told:
        assert f"load average {load} on {cores} cores" in warning


def test_the_rank_with_the_least_is_told():
    whole = ProcessorShare(rank=0, computed_s=9.9, elapsed_s=10.0)
    half = ProcessorShare(rank=1, computed_s=5.0, elapsed_s=10.0)
    assert taken_cores([]) is None
    assert taken_cores([whole]) is None
    assert "a rank had 50% of a core" in taken_cores([whole, half])
