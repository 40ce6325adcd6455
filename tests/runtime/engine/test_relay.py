from __future__ import annotations

import threading

import pytest
import torch

from runtime.engine.relay import Relay, RelayClosedError


@pytest.fixture
def relay():
    relay = Relay()
    yield relay
    relay.close()


def test_bodies_run_when_they_are_resumed_and_in_threads_of_their_own(relay):
    events: list[str] = []

    def body(name: str, pauses: int):
        for i in range(pauses):
            events.append(f"{name}{i}")
            relay.pause()
        events.append(f"{name} ends in {threading.current_thread() is threading.main_thread()}")

    relay.begin(0, lambda: body("a", 2))
    relay.begin(1, lambda: body("b", 1))
    assert events == []
    assert [relay.resume(place) for place in (1, 0, 0, 1, 0)] == [True, True, True, False, False]
    assert events == ["b0", "a0", "a1", "b ends in False", "a ends in False"]
    assert not relay.resume(0), "a body that has ended has nothing more to do"


def test_a_body_pauses_inside_of_a_backward(relay):
    class Pausing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            relay.pause()
            return grad * 2

    inputs = [torch.tensor(3.0, requires_grad=True) for _ in range(2)]

    def body(x):
        Pausing.apply(Pausing.apply(x)).backward()

    for place, x in enumerate(inputs):
        relay.begin(place, lambda x=x: body(x))
    turns = 0
    while relay.resume(0) | relay.resume(1):
        turns += 1
    assert turns == 2
    assert [x.grad for x in inputs] == [4.0, 4.0]


def test_whoever_resumes_a_body_gets_its_error_and_the_thread_lives_on(relay):
    def broken():
        relay.pause()
        raise ValueError("broken")

    relay.begin(0, broken)
    assert relay.resume(0)
    with pytest.raises(ValueError, match="broken"):
        relay.resume(0)
    done: list[bool] = []
    relay.begin(0, lambda: done.append(True))
    assert not relay.resume(0)
    assert done == [True]


def test_closing_ends_a_body_that_has_paused():
    relay = Relay()
    seen: list[BaseException] = []

    def body():
        try:
            relay.pause()
        except RelayClosedError as error:
            seen.append(error)
            raise

    relay.begin(0, body)
    relay.begin(1, body)  # never resumed, so it never begins
    relay.resume(0)
    relay.close()
    assert len(seen) == 1
    assert not [thread for thread in threading.enumerate() if thread.name == "relay"]


def test_threads_are_prepared():
    seen: list[str] = []
    relay = Relay(prepare=lambda: seen.append(threading.current_thread().name))
    relay.begin(0, lambda: None)
    relay.resume(0)
    relay.close()
    assert seen == ["relay"]


def test_whoever_resumes_a_body_gets_the_error_of_its_threads_preparation():
    failures = [OSError("no device")]

    def prepare():
        if failures:
            raise failures.pop()

    relay = Relay(prepare)
    done: list[bool] = []
    seen: list[BaseException] = []

    def resume():
        try:
            relay.resume(0)
        except OSError as error:
            seen.append(error)

    relay.begin(0, lambda: done.append(True))
    resuming = threading.Thread(target=resume, daemon=True)  # it must not hang the tests
    resuming.start()
    resuming.join(30)
    assert [str(error) for error in seen] == ["no device"]
    assert done == []
    relay.begin(0, lambda: done.append(True))  # prepared by now
    relay.resume(0)
    relay.close()
    assert done == [True]
