"""How our processes are started by others, and how one ends that has threads of native libraries."""

from __future__ import annotations

import os
import sys
import threading
from typing import NoReturn


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
