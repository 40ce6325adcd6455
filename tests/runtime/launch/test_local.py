"""How ranks are watched over and ended; here they are small programs, real ones in integration."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from muxtune.support.errors import RunError
from runtime.engine.job import PEER_LOST_EXIT_CODE, RunJob
from runtime.launch import local
from runtime.launch.local import launch_ranks
from tests.integration.processes import wait_until

ABORTS = "import os; os.abort()"
ABORTS_AFTER_RANK_2 = """
import os, sys, time
while not os.path.exists(sys.argv[1].replace("cause-0", "cause-2")):
    time.sleep(0.01)
os.abort()
"""
HANGS = "import time; time.sleep(600)"
LOSES_A_PEER = "import sys; open(sys.argv[1], 'w').write('rank 9 did not answer'); sys.exit(75)"
FAILS = "import sys, time; time.sleep(1); open(sys.argv[1], 'w').write('no memory'); sys.exit(1)"


def _run(monkeypatch, folder: Path, programs: list[str], device: str = "cpu") -> str:
    """What is said of ranks that run these programs, which get a path for their cause."""

    def start(job: RunJob, rank: int, meeting: Path, logs: Path) -> local._Rank:
        del job, logs
        command = [sys.executable, "-c", programs[rank], str(meeting / f"cause-{rank}")]
        return local._Rank(command, stdin=subprocess.PIPE, process_group=0)

    monkeypatch.setattr(local, "_start", start)
    job = RunJob(out_dir=folder, steps=1, first_step=0, checkpoint_every=1, device=device)
    with pytest.raises(RunError) as caught:
        launch_ranks(job, len(programs), lambda done: None)
    return str(caught.value)


def test_the_exit_code_in_these_programs_is_that_of_a_lost_peer():
    assert f"sys.exit({PEER_LOST_EXIT_CODE})" in LOSES_A_PEER


def test_a_rank_that_nccl_aborted_is_not_blamed_for_what_another_one_did(monkeypatch, tmp_path):
    monkeypatch.setattr(local, "_CAUSE_WAIT_S", 60.0)
    assert _run(monkeypatch, tmp_path, [ABORTS, FAILS], "cuda").startswith("rank 1: no memory")


def test_a_rank_that_nccl_aborted_is_not_blamed_for_one_that_hangs(monkeypatch, tmp_path):
    monkeypatch.setattr(local, "_CAUSE_WAIT_S", 1.0)
    said = _run(monkeypatch, tmp_path, [ABORTS, HANGS], "cuda")
    assert said.startswith("rank 1: hangs, and was killed; rank 0: killed by SIGABRT")


def test_a_rank_that_hangs_is_told_in_the_words_of_one_that_waited(monkeypatch, tmp_path):
    monkeypatch.setattr(local, "_CAUSE_WAIT_S", 2.0)
    said = _run(monkeypatch, tmp_path, [ABORTS_AFTER_RANK_2, HANGS, LOSES_A_PEER], "cuda")
    assert said.startswith("rank 1: hangs, and was killed; rank 2: rank 9 did not answer")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_where_none_has_another_cause_it_is_the_one_that_was_aborted(device, monkeypatch, tmp_path):
    monkeypatch.setattr(local, "_CAUSE_WAIT_S", 60.0)
    said = _run(monkeypatch, tmp_path, [LOSES_A_PEER, ABORTS], device)
    assert said.startswith("rank 1: killed by SIGABRT")


def test_an_abort_without_nccl_is_a_cause(monkeypatch, tmp_path):
    assert _run(monkeypatch, tmp_path, [ABORTS, HANGS]).startswith("rank 0: killed by SIGABRT")


@dataclass
class FakeRank:
    """Ends at once if it is the first, and tells what is asked of it."""

    rank: int
    calls: list[tuple[str, int]] = field(default_factory=list)

    def poll(self) -> int | None:
        return None if self.rank else 1

    def kill(self) -> None:
        self.calls.append(("kill", self.rank))

    def communicate(self) -> None:
        self.calls.append(("wait", self.rank))


def test_all_ranks_are_killed_before_the_end_of_any_is_waited_for(monkeypatch, tmp_path):
    calls: list[tuple[str, int]] = []
    monkeypatch.setattr(local, "_start", lambda job, rank, meeting, logs: FakeRank(rank, calls))
    job = RunJob(out_dir=tmp_path, steps=1, first_step=0, checkpoint_every=1)
    with pytest.raises(RunError, match="rank 0: exit code 1"):
        launch_ranks(job, 3, lambda done: None)
    assert calls == [("kill", 0), ("kill", 1), ("kill", 2), ("wait", 0), ("wait", 1), ("wait", 2)]


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_processes_that_ranks_started_end_with_them_even_if_the_rank_had_ended(monkeypatch, tmp_path):
    starts = (
        "import pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen(['sleep', '600'])\n"
        "pathlib.Path({path!r}).write_text(str(child.pid))\n"
    )
    paths = [tmp_path / f"child-{rank}" for rank in range(2)]
    first = starts + "while not pathlib.Path({other!r}).exists(): time.sleep(0.01)\nsys.exit(1)"
    programs = [
        first.format(path=str(paths[0]), other=str(paths[1])),
        starts.format(path=str(paths[1])) + HANGS,
    ]
    assert _run(monkeypatch, tmp_path, programs).startswith("rank 0: exit code 1")
    wait_until(lambda: all(path.read_text() for path in paths), 30)
    pids = [int(path.read_text()) for path in paths]
    try:
        wait_until(lambda: not any(_lives(pid) for pid in pids), 30)
    finally:
        for pid in filter(_lives, pids):
            os.kill(pid, signal.SIGKILL)


def _lives(pid: int) -> bool:
    """Whether it is there and no zombie: the machine's first process may not wait for orphans."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
