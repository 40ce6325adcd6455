"""Ranks meet."""

import threading
import time

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


def test_who_waits_leaves_the_core_to_others(shared):
    first, second = (Rendezvous(shared, rank, 2) for rank in range(2))
    threading.Timer(0.5, second.arrive).start()
    before_s = time.process_time()
    first.barrier()
    # Of half a second, a fraction of a millisecond spins; the bound allows for a slow machine.
    assert time.process_time() - before_s < 0.1


def test_a_rank_that_is_ahead_does_not_stand_for_one_behind(tmp_path):
    create_rendezvous(tmp_path / "three", 3)
    ranks = [Rendezvous(tmp_path / "three", rank, 3) for rank in range(3)]
    ranks[0].arrive()
    ranks[1].arrive()
    ranks[1].arrive()
    assert not ranks[0].all_arrived()
    ranks[2].arrive()
    assert ranks[0].all_arrived()
    assert not ranks[1].all_arrived()
