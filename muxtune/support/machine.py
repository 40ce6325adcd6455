"""This machine: its processor, and the share of its memory and cores that this process may use.

A container or a batch job has less than the machine: control groups (cgroups, both versions) limit memory and
processor time, at any level of their hierarchy, and a process may be bound to some of the cores.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PROC = Path("/proc")


def processor_name(cpuinfo: Path = _PROC / "cpuinfo") -> str:
    """Name that the processor gives itself, ``AMD EPYC 7B13``; empty where nothing tells.

    Args:
        cpuinfo: Where Linux tells about its processors.
    """
    lines = _text(cpuinfo).splitlines()  # none on other systems
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor())


def package_version(package: str) -> str | None:
    """Version of an installed package, found without loading it."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def memory_limit_bytes(proc: Path = _PROC) -> int:
    """Memory that this process and its children may fill together.

    Args:
        proc: Where Linux tells about processes.
    """
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    files = {"v2": "memory.max", "v1": "memory.limit_in_bytes"}
    limits = [_number(folder / files[kind]) for kind, folder in _control_groups("memory", proc)]
    return min([physical, *(limit for limit in limits if limit is not None)])


def usable_cores(proc: Path = _PROC) -> int:
    """Cores that processes of ours can have to themselves, at least one.

    Args:
        proc: Where Linux tells about processes.
    """
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        cores = os.cpu_count() or 1
    return max(1, min([cores, *(int(share) for share in _processor_shares(proc))]))


def _processor_shares(proc: Path) -> Iterator[float]:
    """Cores' worth of time that each control group may use."""
    for kind, folder in _control_groups("cpu", proc):
        if kind == "v2":
            words = _text(folder / "cpu.max").split()
            quota, period = [*words, "", ""][:2]
        else:
            quota, period = (_text(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
        if quota.isdigit() and period.isdigit() and int(period) > 0:  # "max" and -1 are none
            yield int(quota) / int(period)


def _control_groups(controller: str, proc: Path) -> Iterator[tuple[str, Path]]:
    """Version and folder of every control group that this process is in, the innermost first."""
    own: dict[str, str] = {}
    for line in _text(proc / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        own[controllers or "v2"] = path
    for line in _text(proc / "self" / "mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = [*after.split(), "", "", ""][:3]
        root, mount = before.split()[3:5]
        if kind == "cgroup2":
            name, inside = "v2", Path(own.get("v2", "/"))
        elif kind == "cgroup" and controller in options.split(","):
            name = "v1"
            inside = Path(next((path for names, path in own.items() if controller in names.split(",")), "/"))
        else:
            continue
        # Inside a container the mount shows a part of the hierarchy, perhaps below the named path.
        below = inside.relative_to(root) if inside.is_relative_to(root) else Path()
        folder = Path(mount) / below
        while True:
            if folder.is_dir():
                yield name, folder
            if folder in {Path(mount), Path("/")}:
                break
            folder = folder.parent


def _number(path: Path) -> int | None:
    """A whole number in a file; None where there is no file, or no limit (``max``)."""
    text = _text(path)
    return int(text) if text.isdigit() else None


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
