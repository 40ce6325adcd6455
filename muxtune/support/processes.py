"""How our processes are started by others, and how one ends that has threads of native libraries."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""Ctrl-C, and what a scheduler or ``kill`` sends to end a job."""


class Stopped(BaseException):  # as KeyboardInterrupt, for nothing is wrong; click would say "Aborted!" of one
    """A person or a scheduler ends the command.

    Args:
        signal: Signal that told us.
        kept: What is left of the work and how to go on, for people.
    """

    def __init__(self, signal: signal.Signals, kept: str = "") -> None:
        super().__init__(signal, kept)
        self.signal = signal
        self.kept = kept

    def __str__(self) -> str:
        return f"stopped by {self.signal.name}" + (f": {self.kept}" if self.kept else "")

    @property
    def exit_code(self) -> int:
        """Exit code as a shell has it: 130 after Ctrl-C, 143 after SIGTERM."""
        return 128 + self.signal


@contextmanager
def stoppable() -> Iterator[None]:
    """Inside, the first signal that asks us to stop raises :class:`Stopped`; a second one ends us at once.

    Ranks that we have started end with us. A signal that whoever started us has us ignore stays ignored, as
    Ctrl-C in a script's background jobs. Outside of the main thread this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came = False

    def stop(number: int, _: FrameType | None) -> None:
        nonlocal came
        stopped = Stopped(signal.Signals(number))
        if came:
            os._exit(stopped.exit_code)
        came = True
        raise stopped

    former = {
        each: signal.signal(each, stop)
        for each in STOP_SIGNALS
        if signal.getsignal(each) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        for each, handler in former.items():
            signal.signal(each, handler)


@contextmanager
def keeping(kept: Callable[[], str]) -> Iterator[None]:
    """Have a :class:`Stopped` from inside say what is kept, in place of what was said of a part of the work.

    Args:
        kept: What is left of the work and how to go on, for people.
    """
    try:
        yield
    except Stopped as stopped:
        raise Stopped(stopped.signal, kept()) from None


@contextmanager
def end_when_stopped(kept: Callable[[], str], rank: int) -> Iterator[None]:
    """Inside, a signal that asks one of torchrun's ranks to stop ends it, even while it waits for others.

    Python runs its own handlers only between two steps of the main thread, which may never come there; but it
    writes the signal's number into a pipe at once, which another thread reads.

    Args:
        kept: What is left of the work.
        rank: The first one says so; one line is enough.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    source, sink = os.pipe()
    os.set_blocking(sink, False)

    def end() -> None:
        number = os.read(source, 1)
        while number and number[0] not in STOP_SIGNALS:
            number = os.read(source, 1)
        if not number:
            return
        stopped = Stopped(signal.Signals(number[0]))
        try:
            if rank == 0:
                os.write(2, f"muxtune: {Stopped(stopped.signal, kept())}\n".encode())
        finally:
            os._exit(stopped.exit_code)

    former = {each: signal.signal(each, lambda *_: None) for each in STOP_SIGNALS}
    wakeup = signal.set_wakeup_fd(sink, warn_on_full_buffer=False)
    reader = threading.Thread(target=end, daemon=True)
    reader.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        for each, handler in former.items():
            signal.signal(each, handler)
        os.close(sink)  # ends the thread
        reader.join()
        os.close(source)


def under_torchrun() -> bool:
    """Whether this process is one rank of a job that ``torchrun`` started."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"))


def keep_current_directory_out() -> None:
    """Let no Python process that this one starts take a module from the current directory.

    Workers of libraries are started with ``-c`` or ``-m``, which put that directory in front of everything:
    a ``random.py`` that lies there would be run. What ``PYTHONPATH`` names is still found.
    """
    os.environ["PYTHONSAFEPATH"] = "1"


def end_with_parent() -> None:
    """End this process, whatever it does then, as soon as its parent has ended.

    The parent holds the other end of our stdin and never writes: the pipe ends when the parent does.
    """
    threading.Thread(target=_wait_for_end, daemon=True).start()


def _wait_for_end() -> None:
    os.read(0, 1)  # not sys.stdin: its lock, held by this thread, would abort the interpreter's exit
    os._exit(1)


def end_process(code: int = 0) -> NoReturn:
    """End with an exit code and without the interpreter's own finish; everything has been written by now.

    A thread of a native library (gloo's, the profiler's) that wants the interpreter's lock while that
    finishes is ended by force, and in C++ code that allows no exception this aborts the whole process:
    rarely, and after all work was done.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
