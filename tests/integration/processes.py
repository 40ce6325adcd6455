"""Ranks of a run as the operating system sees them (Linux)."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path


def rank_pids(out_dir: Path) -> dict[int, int]:
    """Process id of each living rank whose run is in ``out_dir``."""
    pids = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:  # it has just ended
            continue
        if len(words) > 5 and b"runtime.engine.rank" in words[2] and str(out_dir).encode() in words[3]:
            pids[int(words[4])] = int(path.parent.name)
    return pids


def wait_until(condition: Callable[[], bool], timeout_s: float) -> None:
    """Look so rarely that the processes waited for do not notice, and fail after ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s"
        time.sleep(0.02)
