"""What differs between the kinds of devices that are measured; everything else is the same code for all.

A measuring process belongs to one device. :data:`DEVICES` has the kinds by name; another kind is another
subclass of :class:`Device` there.
"""

from __future__ import annotations

import math
import os
import platform
import re
import time
from abc import ABC, abstractmethod
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict

from muxtune.costs.applicability import DEFAULT_KERNELS, KERNELS_VARIABLE
from muxtune.costs.profile import ClockReading
from muxtune.support.errors import UserError
from muxtune.support.machine import processor_name, usable_cores
from profiler.nvidia_smi import query_gpu, throttle_reasons
from profiler.timing import CpuTimer, CudaTimer, Timer, WallTimer


class Description(BaseModel):
    """A device in words, for a profile's provenance."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    processor: str
    versions: dict[str, str]
    """Versions of the libraries that compute on it."""
    settings: dict[str, str]
    """Settings that can be read, by name."""


class Device(ABC):
    """One rank's device. Making one binds the process to it: what torch runs from then on is there.

    Args:
        rank: Rank of the measuring process.
    """

    backend: ClassVar[str]
    """Backend of torch.distributed, between ranks on such devices."""
    shared_by_ranks: ClassVar[bool]
    """Whether ranks that use the same device can communicate."""
    group_per_direction: ClassVar[bool]
    """Whether messages back need a group of their own, because what a pair of ranks posts goes in order."""

    name: str
    """Name for torch: ``cpu``, ``cuda:1``."""
    timer: Timer
    """Timer of operators: of work that needs no other rank."""
    link_timer: Timer
    """Timer of messages and collectives: waiting for other ranks counts."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    @classmethod
    @abstractmethod
    def count(cls) -> int:
        """How many this machine has.

        Raises:
            UserError: This machine has none.
        """

    @abstractmethod
    def copies(self, bytes_: float) -> int:
        """How many copies of an operator that touches so many bytes take turns, each out of the caches."""

    @abstractmethod
    def processor_s(self) -> float:
        """A clock of the processor time that a rank's actions lose to what else the process does."""

    @abstractmethod
    def describe(self) -> Description:
        """Processor, versions and settings."""

    @abstractmethod
    def read_clocks(self, moment: Literal["before", "after"]) -> ClockReading:
        """Clocks of the device while it is busy: an idle one lowers them."""


class CpuDevice(Device):
    """One core. All threads of a rank share it."""

    backend = "gloo"
    shared_by_ranks = True
    group_per_direction = False  # in 4 KB each way, two groups take 42 instead of 37 us
    _COLD_BYTES = 8 << 20
    """An operator runs on so much memory before it comes back to the same: more than a core's caches hold."""
    _MAX_COPIES = 4
    _BUSY_S = 0.1

    def __init__(self, rank: int) -> None:
        super().__init__(rank)
        self.name = "cpu"
        self.timer, self.link_timer = CpuTimer(), WallTimer()

    @classmethod
    def count(cls) -> int:
        """Cores that processes here may have."""
        return usable_cores()

    def copies(self, bytes_: float) -> int:
        """Copies out of the caches: in a real pass a layer's weights were last used a whole pass ago."""
        return max(1, min(self._MAX_COPIES, math.ceil(self._COLD_BYTES / bytes_)))

    def processor_s(self) -> float:
        """Processor time of all threads: what moves a message needs the core that the actions are on."""
        return time.process_time()

    def describe(self) -> Description:
        """Description of the machine and of torch's libraries."""
        import torch

        built = torch.__config__.show()
        versions = {name: found[1] for name, p in _LIBRARIES.items() if (found := re.search(p, built))}
        settings = {
            "cores": str(self.count()),
            "kernels": _kernels(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "threads": str(torch.get_num_threads()),
        }
        governor = _CPUFREQ / "cpu0/cpufreq/scaling_governor"
        if governor.is_file():
            settings["governor"] = governor.read_text().strip()
        return Description(
            processor=processor_name(_CPUINFO) or platform.machine(),
            versions=versions,
            settings=settings,
        )

    def read_clocks(self, moment: Literal["before", "after"]) -> ClockReading:
        """Clock of the fastest core, which a busy process is on."""
        end_s = time.perf_counter() + self._BUSY_S
        while time.perf_counter() < end_s:
            pass
        mhz = [int(path.read_text()) / 1e3 for path in _CPUFREQ.glob("cpu*/cpufreq/scaling_cur_freq")]
        mhz = mhz or [float(value) for value in _cpuinfo("cpu MHz")]
        return ClockReading(rank=self.rank, moment=moment, mhz={"core": max(mhz)} if mhz else {})


_LIBRARIES = {"mkl": r"Math Kernel Library Version (\S+)", "onednn": r"MKL-DNN v(\S+)"}
"""Libraries and their versions in ``torch.__config__.show()``. Gloo has no version of its own: it is part of
torch."""


def _kernels() -> str:
    return os.environ.get(KERNELS_VARIABLE, DEFAULT_KERNELS)


_CPUFREQ = Path("/sys/devices/system/cpu")
_CPUINFO = Path("/proc/cpuinfo")


def _cpuinfo(field: str) -> list[str]:
    """Values of a field, one per core; none where there is no such file."""
    if not _CPUINFO.is_file():
        return []
    lines = (line.partition(":") for line in _CPUINFO.read_text().splitlines())
    return [value.strip() for name, _, value in lines if name.strip() == field]


class CudaDevice(Device):
    """One GPU; ranks beyond the number of GPUs share them in turn.

    The L2 cache is overwritten before each timed operator, because a layer's weights are not there in a real
    pass. That also gives the host a head start: kernels that it has started by then follow each other as
    they do in a stage, where it runs ahead.
    """

    backend = "nccl"
    shared_by_ranks = False  # NCCL refuses two ranks on one GPU
    group_per_direction = True  # a receive that waits would hold up the send behind it

    def __init__(self, rank: int) -> None:
        import torch

        super().__init__(rank)
        index = rank % torch.cuda.device_count()
        torch.cuda.set_device(index)
        self.name = f"cuda:{index}"
        properties = torch.cuda.get_device_properties(index)
        uuid = str(properties.uuid)
        self._uuid = uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"
        self._flush = torch.empty(2 * properties.L2_cache_size, dtype=torch.uint8, device=self.name).zero_
        self.timer = CudaTimer(partial(torch.cuda.Event, enable_timing=True), self._flush)
        # Blocking: waiting for other ranks then takes no processor time, which is measured too.
        self.link_timer = CudaTimer(partial(torch.cuda.Event, enable_timing=True, blocking=True))

    @classmethod
    def count(cls) -> int:
        """GPUs that torch sees."""
        import torch

        if not torch.cuda.is_available():
            raise UserError(
                "device = 'cuda': expected a CUDA device on this machine, and a torch build for it"
            )
        return torch.cuda.device_count()

    def copies(self, bytes_: float) -> int:
        """One: the timer empties the cache."""
        return 1

    def processor_s(self) -> float:
        """Processor time of the calling thread, which starts the kernels; others have cores of their own."""
        return time.thread_time()

    def describe(self) -> Description:
        """Description of the GPU, CUDA's libraries and the driver."""
        import torch

        versions = {
            "cuda": str(torch.version.cuda),
            "cudnn": str(torch.backends.cudnn.version()),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        }
        settings = {
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
            "kernels": _kernels(),
        }
        answers = query_gpu(self._uuid, ["driver_version", *_GPU_SETTINGS.values()])
        if "driver_version" in answers:
            versions["driver"] = answers["driver_version"]
        settings |= {name: answers[field] for name, field in _GPU_SETTINGS.items() if field in answers}
        return Description(
            processor=torch.cuda.get_device_name(self.name), versions=versions, settings=settings
        )

    def read_clocks(self, moment: Literal["before", "after"]) -> ClockReading:
        """Clocks that the driver tells, slowly; the GPU overwrites its cache meanwhile."""
        answers = query_gpu(self._uuid, [*_GPU_CLOCKS.values(), _GPU_THROTTLED], self._keep_busy)
        return ClockReading(
            rank=self.rank,
            moment=moment,
            mhz={name: float(answers[field]) for name, field in _GPU_CLOCKS.items() if field in answers},
            throttled_by=throttle_reasons(answers.get(_GPU_THROTTLED, "0x0")),
        )

    def _keep_busy(self) -> None:
        import torch

        for _ in range(64):
            self._flush()
        torch.cuda.synchronize()


_GPU_SETTINGS = {
    "power_limit_w": "power.limit",
    "max_sm_mhz": "clocks.max.sm",
    "max_memory_mhz": "clocks.max.memory",
}
_GPU_CLOCKS = {"sm": "clocks.sm", "memory": "clocks.mem"}
_GPU_THROTTLED = "clocks_throttle_reasons.active"
"""Drivers since 535 call it clocks_event_reasons.active, and know this name too."""

DEVICES: dict[str, type[Device]] = {"cpu": CpuDevice, "cuda": CudaDevice}
"""Kinds of devices by the name that a profile has."""
