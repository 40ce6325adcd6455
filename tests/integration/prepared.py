"""Ranks that are forked from a process which has imported everything, instead of started from nothing.

A rank spends four seconds of a core on importing torch, transformers and peft, and with the models of these
tests less than that on its work. What a rank does, and how it is watched over, is the product's own code
either way. How ranks start and end is tested with real ones (test_local.py, test_run_faults.py).
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest

import runtime.launch.local
from runtime.engine.job import RunJob

_RANK_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    # A bar brings a semaphore, which a rank, as it ends, leaves to the tracker that it shares with the tests.
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}
"""What the launcher sets, and quiet; the server has to have it before it imports torch."""


class PreparedRank:
    """As much of ``subprocess.Popen`` as the launcher needs."""

    def __init__(
        self,
        job: RunJob,
        rank: int,
        meeting: Path,
        logs: Path,
        *,
        before: Callable[[int], None] | None = None,
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        stdin, self._stdin = context.Pipe(duplex=False)
        words = [job.model_dump_json(), str(rank), str(meeting)]
        self._process: ForkServerProcess = context.Process(
            target=_be_rank, args=(words, stdin, logs / f"rank-{rank}.log", before)
        )
        self._process.start()
        stdin.close()

    def poll(self) -> int | None:
        """Exit code, once there is one."""
        return self._process.exitcode

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()

    def communicate(self) -> None:
        """Wait for its end."""
        self._process.join()
        self._stdin.close()


def _be_rank(words: list[str], stdin: Connection, log: Path, before: Callable[[int], None] | None) -> None:
    """Take the place of ``python -c "from runtime.engine.rank import main; main()"``."""
    from runtime.engine.rank import main

    sys.argv = ["-c", *words]
    os.dup2(stdin.fileno(), 0)
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if before is not None:
        before(int(words[1]))
    try:
        main()
    except Exception:  # multiprocessing would keep it from the hook that the rank has set
        sys.excepthook(*sys.exc_info())


@contextmanager
def prepared_ranks(before: Callable[[int], None] | None = None) -> Iterator[None]:
    """Inside, :func:`runtime.run_plan` starts its ranks in this way.

    Args:
        before: Called in every rank with its number, before it begins; may replace what fails on demand.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([f"{__package__}.rank_imports"])
    with pytest.MonkeyPatch.context() as patch:
        for name, value in _RANK_ENVIRONMENT.items():
            patch.setenv(name, value)
        patch.setattr(runtime.launch.local, "_start", partial(PreparedRank, before=before))
        yield
