"""Python code that takes turns: several bodies of which one runs at a time, each on a stack of its own.

A body pauses wherever it happens to be, deep inside of a module's forward or of an autograd function's
backward, and goes on from there when its turn comes. Threads are the stacks: generators cannot pause inside
of a call, and an autograd engine keeps what it is doing in its thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

Body = Callable[[], None]


class RelayClosedError(RuntimeError):
    """Raised in a body that pauses, when nobody will resume it."""


class Relay:
    """Threads that hand one baton to each other and back.

    What is not thread-local needs no lock: everything that one body has done before a hand-over is seen by
    the next.

    Args:
        prepare: Called in each thread before its first body, for settings that are a thread's own.
    """

    def __init__(self, prepare: Body | None = None) -> None:
        self._prepare = prepare
        self._runners: list[_Runner] = []
        self._turn: _Runner | None = None

    def begin(self, place: int, body: Body) -> None:
        """Give a place its next body; it runs when it is resumed.

        Args:
            place: Number from 0; a thread belongs to each.
            body: The place's body before has ended.
        """
        while len(self._runners) <= place:
            self._runners.append(_Runner(self._prepare))
        self._runners[place].take(body)

    def resume(self, place: int) -> bool:
        """Let a place's body run until it pauses or ends.

        Returns:
            Whether it has more to do; False too if it had already ended.

        Raises:
            BaseException: What the body raised, or the preparation of its thread.
        """
        runner = self._runners[place]
        if runner.ended:
            return False
        self._turn = runner
        try:
            runner.run()
        finally:
            self._turn = None
        return not runner.ended

    def pause(self) -> None:
        """Called by the body that runs; returns when it is resumed.

        Raises:
            RelayClosedError: The relay was closed instead.
        """
        runner = self._turn
        assert runner is not None, "only a body that runs can pause"
        runner.pause()

    def close(self) -> None:
        """End the threads; bodies that have paused see :class:`RelayClosedError`."""
        for runner in self._runners:
            runner.close()
        self._runners.clear()


class _Runner:
    """One thread and two locks, both taken: whoever has the baton releases the one that the other waits for.

    Locks instead of semaphores: those are written in Python, and a hand-over takes twice as long.
    """

    def __init__(self, prepare: Body | None) -> None:
        self._go, self._back = threading.Lock(), threading.Lock()
        self._go.acquire()
        self._back.acquire()
        self._body: Body | None = None
        self._error: BaseException | None = None
        self._closed = False
        self._prepare = prepare
        # A daemon: a process that ends while a body has paused must not wait for it.
        self._thread = threading.Thread(target=self._loop, name="relay", daemon=True)
        self._thread.start()

    @property
    def ended(self) -> bool:
        """Whether there is no body, or it has ended."""
        return self._body is None

    def take(self, body: Body) -> None:
        assert self.ended, "one body after the other"
        self._body = body

    def run(self) -> None:
        self._go.release()
        self._back.acquire()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def pause(self) -> None:
        self._back.release()
        self._go.acquire()
        if self._closed:
            raise RelayClosedError("the relay was closed")

    def close(self) -> None:
        self._closed = True
        self._go.release()
        self._thread.join()

    def _loop(self) -> None:
        prepare = self._prepare
        while True:
            self._go.acquire()
            if self._closed:
                return
            assert self._body is not None
            try:
                if prepare is not None:
                    prepare()
                    prepare = None
                self._body()
            except BaseException as error:  # whoever resumes it gets it, whatever it is
                self._error = error
            self._body = None
            if self._closed:
                return
            self._back.release()
