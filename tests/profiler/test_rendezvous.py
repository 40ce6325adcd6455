"""Ranks meet."""

import threading

import pytest

from profiler.rendezvous import Rendezvous, create_rendezvous


@pytest.fixture
def shared(tmp_path):
    create_rendezvous(tmp_path / "shared", 2)
    return tmp_path / "shared"


def test_nobody_passes_before_the_last_has_come(shared):
    first, second = (Rendezvous(shared, rank, 2) for rank in range(2))
    passed = threading.Event()

    def meet():
        first.barrier()
        passed.set()

    thread = threading.Thread(target=meet)
    thread.start()
    assert not passed.wait(0.1)
    second.arrive()
    assert passed.wait(10)
    thread.join()
    assert second.all_arrived()


def test_counting_goes_on(shared):
    first, second = (Rendezvous(shared, rank, 2) for rank in range(2))
    for _ in range(3):
        first.arrive()
        assert not first.all_arrived()
        second.arrive()
        assert first.all_arrived()
