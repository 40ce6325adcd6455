"""What a benchmark says about where it ran."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch


def machine_line() -> str:
    """Processor, cores, system and library versions, in one line."""
    return (
        f"{_processor()}, {os.cpu_count()} cores, {platform.system()}, "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
