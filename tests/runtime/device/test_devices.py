"""Which device a rank gets, what is refused, and what a GPU's memory says; torch's CUDA calls are faked."""

from __future__ import annotations

import os
import platform
import threading
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from muxtune.support.errors import SpecError
from runtime.device.allocations import AllocationTrace
from runtime.device.devices import CPU, Cuda, check_devices, check_memory, rank_device
from runtime.device.stopwatch import EventStopwatch, HostStopwatch

MIB = 2**20
SETTINGS = {"CUDA_DEVICE_MAX_CONNECTIONS": "32", "CUDA_MODULE_LOADING": "EAGER"}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Takes the settings for CUDA back, which are made for good."""
    for name in SETTINGS:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture
def machine(monkeypatch):
    """A machine with two GPUs and NCCL."""

    def has(count: int, *, nccl: bool = True) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(dist, "is_nccl_available", lambda: nccl)

    has(2)
    return has


@pytest.fixture
def torchrun(monkeypatch):
    """Rank 5 of 8 on two nodes of four."""
    names = {"RANK": 5, "WORLD_SIZE": 8, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 4, "MASTER_ADDR": "node-0"}
    for name, value in names.items():
        monkeypatch.setenv(name, str(value))


def test_on_one_machine_a_rank_has_the_gpu_of_its_number():
    assert [rank_device("cuda", rank).name for rank in range(3)] == ["cuda:0", "cuda:1", "cuda:2"]
    assert rank_device("cpu", 2) is CPU


def test_under_torchrun_the_number_is_that_on_the_node(torchrun):
    assert rank_device("cuda", 5).name == "cuda:1"
    assert rank_device("cpu", 5).name == "cpu"


def test_enough_gpus_are_accepted_and_a_cpu_always(machine):
    check_devices("cuda", 2, "plan: cluster.device.kind")
    machine(0)
    check_devices("cpu", 64, "plan: cluster.device.kind")


@pytest.mark.parametrize(
    ("count", "nccl", "found"),
    [(0, True, "this torch finds none"), (1, True, "this machine has 1"), (2, False, "torch has no NCCL")],
)
def test_what_is_missing_is_named(machine, count, nccl, found):
    machine(count, nccl=nccl)
    message = rf"^plan: kind = 'cuda': expected 2 CUDA devices on .*, and .*{found}.*; --device cpu tries"
    with pytest.raises(SpecError, match=message):
        check_devices("cuda", 2, "plan: kind")


def test_a_single_rank_needs_no_nccl(machine):
    machine(1, nccl=False)
    check_devices("cuda", 1, "plan: kind")


def test_a_node_of_torchrun_needs_gpus_for_its_own_ranks(machine, torchrun):
    machine(4)
    check_devices("cuda", 8, "plan: kind")
    machine(3)
    with pytest.raises(SpecError, match=r"expected 4 CUDA devices on .*, and this machine has 3"):
        check_devices("cuda", 8, "plan: kind")


def test_cuda_is_set_up_before_anything_asks_it(machine, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(asked.append({**os.environ}) or True))
    check_devices("cuda", 2, "plan: kind")
    assert asked[0].items() >= SETTINGS.items()


def test_settings_of_the_users_own_stay(machine, monkeypatch):
    monkeypatch.setenv("CUDA_MODULE_LOADING", "LAZY")
    check_devices("cuda", 2, "plan: kind")
    assert os.environ["CUDA_MODULE_LOADING"] == "LAZY"


@pytest.fixture
def sizes(monkeypatch):
    """A machine that lends 1000 bytes to the ranks on its processors, and has 40 + i on GPU i."""
    monkeypatch.setattr("runtime.device.devices.ranks_memory_bytes", lambda ranks: 1000)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda index: SimpleNamespace(total_memory=40 + index)
    )


def test_ranks_on_cpu_share_its_memory_and_what_fits_together_is_accepted(sizes):
    check_memory("cpu", [900, 100], "plan: peak")  # more than half of it on one
    whose = f"the memory of {platform.node()}, for 2 ranks together"
    with pytest.raises(SpecError, match=f"^plan: peak = 1001 bytes: expected at most 1000 bytes, {whose}"):
        check_memory("cpu", [900, 101], "plan: peak")


def test_each_gpu_must_hold_its_own_rank(sizes):
    check_memory("cuda", [40, 41, 42], "plan: peak")
    with pytest.raises(
        SpecError, match=r"^plan: peak = 42 bytes: expected at most 41 bytes, the memory of cuda:1 "
    ):
        check_memory("cuda", [40, 42, 42], "plan: peak")


def test_a_node_of_torchrun_holds_its_own_ranks(sizes, torchrun):
    check_memory("cuda", [50] * 4 + [40, 41, 42, 43], "plan: peak")
    check_memory("cpu", [900] * 4 + [250] * 4, "plan: peak")
    with pytest.raises(SpecError, match=r"= 44 bytes: expected at most 42 bytes, the memory of cuda:2 on "):
        check_memory("cuda", [50] * 4 + [40, 41, 44, 43], "plan: peak")


def test_a_gpu_becomes_the_one_of_each_thread_that_computes(monkeypatch):
    entered = []
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda index: entered.append((threading.current_thread().name, index))
    )
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    device = Cuda(1)
    device.enter()
    other = threading.Thread(target=device.enter, name="relay")
    other.start()
    other.join()
    assert entered == [("MainThread", 1), ("relay", 1)]
    assert os.environ.items() >= SETTINGS.items()
    CPU.enter()  # nothing to do


def test_each_device_reads_time_and_memory_in_its_own_way():
    assert isinstance(CPU.stopwatch(), HostStopwatch)
    assert isinstance(CPU.memory_trace(), AllocationTrace)
    assert CPU.peak_bytes() is None
    assert isinstance(Cuda(0).stopwatch(), EventStopwatch)


def test_on_a_gpu_no_receive_waits_before_it_is_needed():
    assert (CPU.posts_ahead, Cuda(0).posts_ahead) == (True, False)


@dataclass
class FakeAllocator:
    """Counts like torch's caching allocator."""

    now: int = 0
    peak: int = 0

    def take(self, bytes_: int) -> None:
        self.now += bytes_
        self.peak = max(self.peak, self.now)

    def install(self, monkeypatch) -> None:
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda index: self.now)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda index: self.peak)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda index: self.restart())

    def restart(self) -> None:
        self.peak = self.now


def test_a_gpus_trace_counts_what_comes_and_goes_inside_of_it(monkeypatch):
    gpu = FakeAllocator()
    gpu.install(monkeypatch)
    device = Cuda(0)
    gpu.take(100 * MIB)
    gpu.take(-40 * MIB)
    with device.memory_trace() as trace:
        gpu.take(30 * MIB)
        gpu.take(-20 * MIB)
    assert (trace.peak_bytes, trace.net_bytes) == (30 * MIB, 10 * MIB)
    assert device.peak_bytes() == 100 * MIB  # of before the trace, which the allocator has forgotten
    gpu.take(80 * MIB)
    assert device.peak_bytes() == 150 * MIB
