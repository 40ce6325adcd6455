"""What this process may use: physical memory and cores, less what any control group above it says."""

import os

import pytest

from muxtune.support.machine import memory_limit_bytes, package_version, processor_name, usable_cores

PHYSICAL = 1 << 40
CORES = 8


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Build a machine: its control groups by version, mount root, own path and files below the mount."""
    sizes = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": PHYSICAL // 4096}
    monkeypatch.setattr(os, "sysconf", lambda name: sizes[name])
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(CORES)), raising=False)

    def build(*, version, own="/", root="/", files=(), controllers="memory,cpu,cpuacct"):
        mount = tmp_path / "sys"
        mount.mkdir()
        for name, text in dict(files).items():
            path = mount / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text}\n")
        proc = tmp_path / "proc" / "self"
        proc.mkdir(parents=True)
        (proc / "cgroup").write_text(
            f"3:pids:/elsewhere\n{'0:' if version == 2 else f'4:{controllers}'}:{own}\n"
        )
        kind, options = ("cgroup2", "rw") if version == 2 else ("cgroup", f"rw,{controllers}")
        (proc / "mountinfo").write_text(
            f"30 23 0:28 / {tmp_path} rw,relatime - tmpfs tmpfs rw\n"
            f"31 30 0:29 {root} {mount} rw,relatime shared:9 - {kind} cgroup {options}\n"
        )
        return tmp_path / "proc"

    return build


GIB = 2**30
MEMORY = [
    ("v2 has a limit", {"version": 2, "own": "/job", "files": {"job/memory.max": 3 * GIB}}, 3 * GIB),
    ("v2 has none", {"version": 2, "own": "/job", "files": {"job/memory.max": "max"}}, PHYSICAL),
    (
        "a group further up has less",
        {"version": 2, "own": "/a/b/c", "files": {"a/memory.max": GIB, "a/b/c/memory.max": 2 * GIB}},
        GIB,
    ),
    (
        "a container sees its part as the whole",
        {"version": 2, "own": "/docker/1234", "root": "/docker/1234", "files": {"memory.max": 2 * GIB}},
        2 * GIB,
    ),
    (
        "a path that is not in the mount",
        {"version": 2, "own": "/outside/of/it", "files": {"memory.max": 5 * GIB}},
        5 * GIB,
    ),
    ("v1", {"version": 1, "own": "/job", "files": {"job/memory.limit_in_bytes": 4 * GIB}}, 4 * GIB),
    (
        "v1 writes a number for no limit",
        {"version": 1, "own": "/job", "files": {"job/memory.limit_in_bytes": 9223372036854771712}},
        PHYSICAL,
    ),
    (
        "v1 nested",
        {
            "version": 1,
            "own": "/slurm/job/step",
            "files": {
                "slurm/job/step/memory.limit_in_bytes": 9223372036854771712,
                "slurm/job/memory.limit_in_bytes": 6 * GIB,
            },
        },
        6 * GIB,
    ),
    (
        "another controller's mount",
        {"version": 1, "controllers": "cpu", "files": {"memory.limit_in_bytes": 1}},
        PHYSICAL,
    ),
    ("an unreadable number", {"version": 2, "files": {"memory.max": "a lot"}}, PHYSICAL),
]


@pytest.mark.parametrize(("given", "limit"), [case[1:] for case in MEMORY], ids=[case[0] for case in MEMORY])
def test_memory_is_that_of_the_tightest_group(machine, given, limit):
    assert memory_limit_bytes(machine(**given)) == limit


SHARES = [
    ("none", {"version": 2, "files": {"cpu.max": "max 100000"}}, CORES),
    ("three cores", {"version": 2, "own": "/job", "files": {"job/cpu.max": "300000 100000"}}, 3),
    ("a share of a core", {"version": 2, "files": {"cpu.max": "50000 100000"}}, 1),
    ("two and a half", {"version": 2, "files": {"cpu.max": "250000 100000"}}, 2),
    ("more than there are", {"version": 2, "files": {"cpu.max": "6400000 100000"}}, CORES),
    (
        "v1",
        {
            "version": 1,
            "own": "/job",
            "files": {"job/cpu.cfs_quota_us": 400000, "job/cpu.cfs_period_us": 100000},
        },
        4,
    ),
    (
        "v1 without a limit",
        {"version": 1, "files": {"cpu.cfs_quota_us": -1, "cpu.cfs_period_us": 100000}},
        CORES,
    ),
]


@pytest.mark.parametrize(("given", "cores"), [case[1:] for case in SHARES], ids=[case[0] for case in SHARES])
def test_cores_are_those_of_the_affinity_and_the_quota(machine, given, cores):
    assert usable_cores(machine(**given)) == cores


def test_a_process_that_is_bound_to_one_core_has_one(machine, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {5}, raising=False)
    assert usable_cores(machine(version=2)) == 1


def test_a_system_without_control_groups_has_what_it_has(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sysconf", lambda _: 1000)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert (memory_limit_bytes(tmp_path), usable_cores(tmp_path)) == (1_000_000, 3)


def test_versions_are_found_without_loading():
    assert package_version("numpy")
    assert package_version("no-such-package-at-all") is None
    assert processor_name() == processor_name().strip()
