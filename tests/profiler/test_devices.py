"""Devices: the CPU as it is, and a GPU that a fake of torch.cuda plays."""

from types import SimpleNamespace

import pytest
import torch

from muxtune.support.errors import UserError
from profiler import devices
from profiler.devices import DEVICES, CpuDevice, CudaDevice
from profiler.timing import CpuTimer, WallTimer
from tests.profiler.fakes import play_nvidia_smi

L2_BYTES = 4096


class FakeGpus:
    """Plays ``torch.cuda``: work takes time on the device's clock, and a mark in it keeps the time."""

    def __init__(self, monkeypatch, count):
        self.now_ms = 5.0
        self.bound = []
        self.flushed_bytes = []
        self.blocking = []
        gpus = self

        class Event:
            def __init__(self, *, enable_timing, blocking=False):
                assert enable_timing
                gpus.blocking.append(blocking)
                self.at_ms = None

            def record(self):
                self.at_ms = gpus.now_ms

            def synchronize(self):
                assert self.at_ms is not None, "nothing to wait for"

            def elapsed_time(self, end_event):
                return end_event.at_ms - self.at_ms

        class Buffer:
            def __init__(self, bytes_, *, dtype, device):
                assert dtype == torch.uint8
                assert device == f"cuda:{gpus.bound[-1]}", "memory of another GPU"
                self.bytes = bytes_

            def zero_(self):
                gpus.flushed_bytes.append(self.bytes)
                gpus.now_ms += 1.0

        properties = SimpleNamespace(uuid="aa-bb", L2_cache_size=L2_BYTES)
        parts = {
            "is_available": lambda: count > 0,
            "device_count": lambda: count,
            "set_device": self.bound.append,
            "get_device_properties": lambda index: properties,
            "get_device_name": lambda name: f"a GPU, {name}",
            "Event": Event,
            "synchronize": lambda: None,
        }
        for name, part in parts.items():
            monkeypatch.setattr(torch.cuda, name, part)
        monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 21, 5))
        monkeypatch.setattr(torch, "empty", Buffer)

    def work(self, milliseconds):
        self.now_ms += milliseconds


@pytest.fixture
def gpus(monkeypatch):
    return FakeGpus(monkeypatch, 2)


def test_kinds_by_name():
    assert {"cpu": CpuDevice, "cuda": CudaDevice} == DEVICES


def test_a_core_computes_and_waits_on_two_clocks():
    device = CpuDevice(1)
    assert (device.rank, device.name) == (1, "cpu")
    assert isinstance(device.timer, CpuTimer)
    assert isinstance(device.link_timer, WallTimer)
    assert device.count() >= 1
    before_s = device.processor_s()
    sum(range(10**6))
    assert device.processor_s() > before_s


@pytest.mark.parametrize(("megabytes", "copies"), [(0.5, 4), (3, 3), (16, 1)])
def test_a_cores_caches_are_overrun_by_copies(megabytes, copies):
    assert CpuDevice(0).copies(megabytes * 2**20) == copies


def test_a_core_describes_itself_with_its_libraries():
    description = CpuDevice(0).describe()
    assert description.processor
    if torch.backends.mkl.is_available():
        assert description.versions["mkl"][0].isdigit()
    if torch.backends.mkldnn.is_available():
        assert description.versions["onednn"][0].isdigit()
    assert int(description.settings["cores"]) == CpuDevice.count()
    assert description.settings["instructions"]


def test_a_cores_governor_and_clock_are_read_where_the_system_tells(tmp_path, monkeypatch):
    for core, khz in enumerate((1_200_000, 3_400_000)):
        folder = tmp_path / f"cpu{core}" / "cpufreq"
        folder.mkdir(parents=True)
        (folder / "scaling_governor").write_text("powersave\n")
        (folder / "scaling_cur_freq").write_text(f"{khz}\n")
    monkeypatch.setattr(devices, "_CPUFREQ", tmp_path)
    assert CpuDevice(0).describe().settings["governor"] == "powersave"
    reading = CpuDevice(3).read_clocks("after")
    assert (reading.rank, reading.moment, reading.mhz) == (3, "after", {"core": 3400.0})


def test_a_core_that_tells_nothing_still_has_a_reading(tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "_CPUFREQ", tmp_path)
    monkeypatch.setattr(devices, "_CPUINFO", tmp_path / "cpuinfo")
    assert CpuDevice(0).read_clocks("before").mhz == {}
    assert CpuDevice(0).describe().processor
    (tmp_path / "cpuinfo").write_text("model name\t: A Core\ncpu MHz\t\t: 2596.1\n\ncpu MHz\t\t: 1000.0\n")
    assert CpuDevice(0).read_clocks("before").mhz == {"core": 2596.1}
    assert CpuDevice(0).describe().processor == "A Core"


def test_without_a_gpu_there_is_none_to_count(monkeypatch):
    FakeGpus(monkeypatch, 0)
    with pytest.raises(UserError, match="expected a CUDA device on this machine"):
        CudaDevice.count()


def test_ranks_are_bound_to_gpus_in_turn(gpus):
    assert CudaDevice.count() == 2
    assert [CudaDevice(rank).name for rank in range(4)] == ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]
    assert gpus.bound == [0, 1, 0, 1]


def test_operators_are_timed_between_events_after_a_flush(gpus):
    timer = CudaDevice(0).timer
    assert timer.call_s(lambda: gpus.work(3.0)) == pytest.approx(3e-3)  # the flush is not in it
    assert gpus.flushed_bytes == [2 * L2_BYTES]
    assert gpus.blocking == [False, False]


def test_links_are_timed_between_blocking_events_without_a_flush(gpus):
    timer = CudaDevice(0).link_timer
    assert timer.call_s(lambda: gpus.work(3.0)) == pytest.approx(3e-3)
    assert gpus.flushed_bytes == []
    assert gpus.blocking == [True, True]


def test_a_gpu_needs_no_copies(gpus):
    assert CudaDevice(0).copies(1.0) == 1


def test_a_gpu_describes_itself_with_its_driver(gpus, tmp_path, monkeypatch):
    calls = play_nvidia_smi(tmp_path, monkeypatch, "550.54.15, 400.00, 1980, [N/A]")
    description = CudaDevice(1).describe()
    assert description.processor == "a GPU, cuda:1"
    assert description.versions["nccl"] == "2.21.5"
    assert description.versions["driver"] == "550.54.15"
    assert {"cuda", "cudnn"} < set(description.versions)
    assert description.settings["power_limit_w"] == "400.00"
    assert description.settings["max_sm_mhz"] == "1980"
    assert "max_memory_mhz" not in description.settings
    assert "--id=GPU-aa-bb" in calls()[0]  # not the index, which CUDA_VISIBLE_DEVICES renumbers


def test_a_gpus_clocks_are_read_under_load(gpus, tmp_path, monkeypatch):
    play_nvidia_smi(tmp_path, monkeypatch, "1200, 2619, 0x0000000000000004", seconds=0.1)
    reading = CudaDevice(1).read_clocks("before")
    assert reading.mhz == {"sm": 1200.0, "memory": 2619.0}
    assert reading.throttled_by == ("power cap",)
    assert gpus.flushed_bytes


def test_a_gpu_without_its_tool_is_still_measured(gpus, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "driver" not in CudaDevice(0).describe().versions
    reading = CudaDevice(0).read_clocks("after")
    assert (reading.mhz, reading.throttled_by) == ({}, ())
