"""Measuring processes of a session: starts them, reads what they say, and leaves none behind."""

from __future__ import annotations

import os
import selectors
import subprocess
import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, cast

from muxtune.support.errors import RunError
from profiler.jobs import Job
from profiler.rendezvous import create_rendezvous
from profiler.worker import JOB_FILE, RENDEZVOUS

_SILENCE_S = 600.0
"""A session that hears nothing for so long has lost a process."""

_PIPE_BYTES = 1 << 16


def measured_lines(job: Job) -> Generator[str, None, None]:
    """What the processes of a job say, line by line as it comes; they end with the iteration.

    Raises:
        RunError: One failed, or none says anything any more.
    """
    with TemporaryDirectory(prefix="muxtune-profile-") as name:
        folder = Path(name)
        (folder / JOB_FILE).write_text(job.model_dump_json())
        create_rendezvous(folder / RENDEZVOUS, job.ranks)
        with _processes(folder, job.processes) as processes:
            yield from _lines(processes, folder)


@contextmanager
def _processes(folder: Path, number: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Measuring processes; none is left when the block ends, however it ends."""
    # The caller's import path as it is, and nothing else: -P keeps the current directory out.
    path = os.pathsep.join(str(Path(entry or ".").resolve()) for entry in sys.path)
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    if sys.platform == "linux":
        # As the runtime has it: gloo would otherwise look for an interface by the host's name.
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(number):
            command = [sys.executable, "-P", "-m", "profiler.worker", str(folder), str(rank)]
            with _error_file(folder, rank).open("w") as errors:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,  # which ends when the session does
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    env=environment,
                    start_new_session=True,  # Ctrl-C reaches the session alone, which then ends them
                )
            processes.append(process)
        yield processes
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                cast("IO[bytes]", pipe).close()


def _lines(processes: Sequence[subprocess.Popen[bytes]], folder: Path) -> Iterator[str]:
    """Lines of all processes as they come, until all have ended.

    Raises:
        RunError: One failed, or none says anything any more.
    """
    unfinished = [b""] * len(processes)
    with selectors.DefaultSelector() as selector:
        for rank, process in enumerate(processes):
            selector.register(cast("IO[bytes]", process.stdout), selectors.EVENT_READ, rank)
        while selector.get_map():
            ready = selector.select(_SILENCE_S)
            if not ready:
                raise RunError(f"profiling stalled: no reading for {_SILENCE_S:.0f} s")
            for key, _ in ready:
                rank = int(key.data)
                received = os.read(key.fd, _PIPE_BYTES)
                *whole, unfinished[rank] = (unfinished[rank] + received).split(b"\n")
                yield from (line.decode() for line in whole)
                if received:
                    continue
                selector.unregister(key.fileobj)
                if processes[rank].wait() != 0:
                    raise RunError(f"profiling failed on rank {rank}: {_last_line(folder, rank)}")


def _error_file(folder: Path, rank: int) -> Path:
    return folder / f"stderr-{rank}"


def _last_line(folder: Path, rank: int) -> str:
    lines = _error_file(folder, rank).read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it ended without a word"
