"""Where a benchmark runs: what it says of the machine, and what operators cost there."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

from muxtune.costs import ProfiledCosts, load_profile
from muxtune.model import ModelSpec
from profiler import profile_model


def machine_line() -> str:
    """Processor, cores, system and library versions, in one line."""
    return (
        f"{_processor()}, {os.cpu_count()} cores, {platform.system()}, "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )


def machine_costs(model: ModelSpec, path: Path | None) -> ProfiledCosts:
    """Costs of a backbone's operators on this machine.

    Args:
        model: The backbone.
        path: Profile of this machine; measured now if None.
    """
    return ProfiledCosts(load_profile(path) if path else profile_model(model, progress=True), model)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
