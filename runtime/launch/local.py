"""Starts the ranks of a run on this machine, and watches over them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from muxtune.support.errors import RunError, UserError
from muxtune.support.run_folder import FolderWatch, meeting_folder
from runtime.engine.job import PEER_LOST_EXIT_CODE, USER_ERROR_EXIT_CODE, RunJob

_POLL_S = 0.05
_CAUSE_WAIT_S = 5.0
"""How long after a rank lost its neighbour the neighbour may take to exit."""


def launch_ranks(job: RunJob, ranks: int, on_progress: Callable[[int], None]) -> None:
    """Run all ranks to their end; none is left behind, however this ends.

    Args:
        job: Job of every rank.
        ranks: Number of ranks.
        on_progress: Called with the number of finished iterations, whenever it has grown.

    Raises:
        RunError: A rank failed; the message has its number and its cause. Or the run's folder is gone.
        UserError: A rank met a mistake of the user's.
    """
    logs = job.out_dir / "logs"
    logs.mkdir(exist_ok=True)
    processes: list[subprocess.Popen[bytes]] = []
    with meeting_folder() as meeting:
        try:
            for rank in range(ranks):
                processes.append(_start(job, rank, meeting, logs))
            _watch(job, processes, meeting, logs, on_progress)
        finally:
            for process in processes:
                process.kill()
            for process in processes:  # only now: the end of a rank that has a GPU takes seconds
                process.communicate()


class _Rank(subprocess.Popen[bytes]):
    """A rank in a process group of its own, which has the processes that it started."""

    def kill(self) -> None:
        """End it and them at once; them even if it has ended."""
        with suppress(ProcessLookupError, PermissionError):  # macOS: for one that nobody has waited for
            os.killpg(self.pid, signal.SIGKILL)


def _start(job: RunJob, rank: int, meeting: Path, logs: Path) -> subprocess.Popen[bytes]:
    environment = dict(os.environ) | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    if sys.platform == "linux":
        # All ranks are here; gloo would otherwise look for an interface by the host's name.
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    start = "from runtime.engine.rank import main; main()"  # -m would load the module twice
    # -P: no module comes from the current directory, where a random.py may lie.
    command = [sys.executable, "-Pc", start, job.model_dump_json(), str(rank), str(meeting)]
    with (logs / f"rank-{rank}.log").open("ab") as log:
        # A process group of its own: Ctrl-C reaches only us, and we end the ranks.
        return _Rank(
            command,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=environment,
            process_group=0,
            pass_fds=() if job.lock is None else (job.lock,),
        )


def _watch(
    job: RunJob,
    processes: list[subprocess.Popen[bytes]],
    meeting: Path,
    logs: Path,
    on_progress: Callable[[int], None],
) -> None:
    # NCCL's watchdog aborts a rank that it finds waiting in vain for another one.
    consequences = {PEER_LOST_EXIT_CODE} | ({-signal.SIGABRT} if job.device == "cuda" else set())
    shown, watch = 0, FolderWatch(job.out_dir)
    while True:
        watch.check()
        codes = [process.poll() for process in processes]
        if any(codes):
            break
        done = _finished_iterations(meeting)
        if done > shown:
            shown = done
            on_progress(done)
        if all(code == 0 for code in codes):
            return
        time.sleep(_POLL_S)
    deadline = time.monotonic() + _CAUSE_WAIT_S
    while True:
        ended = all(process.poll() is not None for process in processes)
        rank = _first_cause(processes, consequences)
        if rank is not None or ended or time.monotonic() > deadline:
            break
        time.sleep(_POLL_S)
    if rank is None:
        raise _error_without_cause(processes, meeting, logs)
    raise _error_of(processes, rank, meeting, logs)


def _first_cause(processes: list[subprocess.Popen[bytes]], consequences: set[int]) -> int | None:
    """A rank that failed by itself, not because another one was gone."""
    for rank, process in enumerate(processes):
        if process.poll() not in {None, 0, *consequences}:
            return rank
    return None


def _error_of(
    processes: list[subprocess.Popen[bytes]], rank: int, meeting: Path, logs: Path
) -> RunError | UserError:
    code = processes[rank].poll()
    cause = meeting / f"cause-{rank}"
    if code is not None and code < 0:
        reason = f"killed by {signal.Signals(-code).name}"
    elif cause.is_file():
        reason = " ".join(cause.read_text().split())
        if code == USER_ERROR_EXIT_CODE:
            return UserError(reason)
    else:
        reason = f"exit code {code}"
    return RunError(f"rank {rank}: {reason} (log: {logs / f'rank-{rank}.log'})")


def _error_without_cause(
    processes: list[subprocess.Popen[bytes]], meeting: Path, logs: Path
) -> RunError | UserError:
    """Ranks lost another one, and none has failed: the one that they gave up still lives."""
    codes = {rank: process.poll() for rank, process in enumerate(processes)}
    hanging = [str(rank) for rank, code in codes.items() if code is None]
    # One that lost another says whom; if all have ended, one that was aborted is nearer to the cause.
    told = [rank for rank, code in codes.items() if code and (code == PEER_LOST_EXIT_CODE) == bool(hanging)]
    lost = told[0] if told else next(rank for rank, code in codes.items() if code)
    error = _error_of(processes, lost, meeting, logs)
    if not hanging:
        return error
    return RunError(f"rank {', '.join(hanging)}: hangs, and was killed; {error}")


def _finished_iterations(meeting: Path) -> int:
    try:
        return int((meeting / "progress").read_text() or 0)
    except FileNotFoundError:
        return 0
