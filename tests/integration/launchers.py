"""``muxtune run`` as a shell starts it: on its own, under one torchrun, under one torchrun per node."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.integration.processes import rank_pids

SPAWNER, ONE_NODE, TWO_NODES = "spawner", "torchrun", "torchrun-on-two-nodes"

END_LIMIT_S = 10.0
"""What the project promises for the time from a failure to the end of the last process."""

_MUXTUNE = [
    sys.executable,
    "-c",
    # A shell's background jobs, and what they start, inherit that SIGINT is ignored.
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from muxtune.cli.app import main; main()",
]
_TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


@dataclass(frozen=True)
class Launch:
    """The processes of one run that a user would have started, and where it goes."""

    run_dir: Path
    launchers: list[subprocess.Popen[bytes]]

    def printed(self, stream: str = "stderr") -> list[str]:
        """What came from each launcher and its ranks."""
        return [
            (self.run_dir.parent / f"{self.run_dir.name}-{node}.{stream}").read_text()
            for node in range(len(self.launchers))
        ]

    def wait(self, timeout_s: float) -> list[int]:
        """Exit codes of the launchers."""
        return [launcher.wait(timeout_s) for launcher in self.launchers]

    def pids(self) -> dict[int, int]:
        """Process id of each living rank."""
        pids = rank_pids(self.run_dir)
        for pid in self.all_pids():
            try:
                environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            except OSError:  # it has just ended
                continue
            ranks = [int(entry[5:]) for entry in environment if entry.startswith(b"RANK=")]
            pids |= dict.fromkeys(ranks, pid)
        return pids

    def all_pids(self) -> list[int]:
        """All living processes that were told the folder of the run."""
        pids = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = path.read_bytes()
            except OSError:  # it has just ended
                continue
            if str(self.run_dir).encode() in words:
                pids.append(int(path.parent.name))
        return pids


@contextmanager
def launched(kind: str, plan: Path, run_dir: Path, *options: str) -> Iterator[Launch]:
    """Start ``muxtune run`` for a plan of two ranks; nothing is left of it when the block ends.

    The nodes have addresses of their own on the loopback device, and share the file system.
    """
    command = [*_MUXTUNE, "run", str(plan), "--out", str(run_dir), *options]
    environment = dict(os.environ) | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    launch = Launch(run_dir, [])
    try:
        for node, front in enumerate(_fronts(kind)):
            streams = [
                (run_dir.parent / f"{run_dir.name}-{node}.{name}").open("wb") for name in ("stdout", "stderr")
            ]
            launch.launchers.append(
                subprocess.Popen([*front, *command], stdout=streams[0], stderr=streams[1], env=environment)
            )
            for stream in streams:
                stream.close()
        yield launch
    finally:
        for pid in launch.all_pids():
            os.kill(pid, signal.SIGKILL)
        launch.wait(30)


def _fronts(kind: str) -> list[list[str]]:
    """What stands before the command, per node."""
    if kind == SPAWNER:
        return [[]]
    if kind == ONE_NODE:
        return [[*_TORCHRUN, "--standalone", "--nproc-per-node=2", "--no-python"]]
    nodes = ["--nnodes=2", "--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={_free_port()}"]
    return [
        [*_TORCHRUN, *nodes, f"--node-rank={node}", f"--local-addr=127.0.0.{node + 1}", "--no-python"]
        for node in range(2)
    ]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
