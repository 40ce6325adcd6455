"""What the operating system says that this process takes: Python, libraries and loading included."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")


def process_peak_bytes() -> int:
    """Most bytes of memory that the process has had resident at once, since its program started."""
    # Linux' getrusage would be wrong: a child starts with the peak of the process that spawned it.
    on_linux = _status_bytes("VmHWM")
    return _rusage_peak_bytes() if on_linux is None else on_linux


def process_bytes() -> int:
    """Bytes of memory that are resident now; where only the peak is told, the most so far."""
    on_linux = _status_bytes("VmRSS")
    return _rusage_peak_bytes() if on_linux is None else on_linux


def _status_bytes(field: str) -> int | None:
    """A size of Linux' status file, which is in KiB; None on other systems."""
    if not _STATUS.is_file():
        return None
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines() if ":" in line)
    size = lines.get(field)
    return None if size is None else int(size.split()[0]) * 1024


def _rusage_peak_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
