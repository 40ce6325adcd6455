"""What a rank's device changes: where tensors live, what carries them, how time and bytes are read.

A plan runs by the same code on processors and on GPUs. Its cluster says on which, and everything that
differs stands here. Small things that ranks tell each other go through gloo in both cases, which is the
default process group; between GPUs, NCCL carries tensors in groups of their own. Nothing here draws random
numbers: dropout's are drawn on the host, so that they are the same on every device.
"""

from __future__ import annotations

import os
import platform
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from muxtune.cluster import DeviceKind, ranks_memory_bytes
from muxtune.support.errors import SpecError
from muxtune.support.processes import under_torchrun
from muxtune.support.tables import Quantity, show_bytes_down, show_bytes_up
from runtime.device.allocations import AllocationTrace, MemoryTrace
from runtime.device.stopwatch import EventStopwatch, HostStopwatch, Stopwatch
from runtime.device.torch_internals import gloo_options, set_group_timeout

if TYPE_CHECKING:
    from runtime.device.torch_internals import Backend


class RankDevice(ABC):
    """The device of one rank."""

    kind: DeviceKind
    name: str
    """Name for torch: ``cpu``, ``cuda:0``."""
    backend: str
    """Backend of process groups whose tensors live here."""
    own_groups: bool
    """Whether every direction between two stages needs a process group of its own."""
    posts_ahead: bool
    """Whether receives are posted before they are needed; one that waits must not hold up the device."""

    @abstractmethod
    def enter(self) -> None:
        """Make it this thread's device; called first in every thread that computes."""

    def group_options(self, timeout_s: float | None) -> Backend.Options:
        """Options of a process group of this backend, which do not inherit the default group's timeout."""
        options = self._new_options()
        if timeout_s is not None:
            set_group_timeout(options, timeout_s)
        return options

    @abstractmethod
    def _new_options(self) -> Backend.Options: ...

    @abstractmethod
    def stopwatch(self) -> Stopwatch:
        """Reads when actions began and ended."""

    @abstractmethod
    def memory_trace(self) -> MemoryTrace:
        """Reads what is allocated inside of a ``with`` block."""

    def peak_bytes(self) -> int | None:
        """Peak of bytes that torch's allocator gave out; None where that is the process's own memory."""
        return None


class Cpu(RankDevice):
    """One core of this machine."""

    kind: DeviceKind = "cpu"
    name = "cpu"
    backend = "gloo"
    own_groups = False  # gloo tells messages apart by tags
    posts_ahead = True

    def enter(self) -> None:
        """Nothing to do."""

    def _new_options(self) -> Backend.Options:
        return gloo_options()

    def stopwatch(self) -> Stopwatch:
        """The host's clock."""
        return HostStopwatch()

    def memory_trace(self) -> MemoryTrace:
        """Trace by torch's profiler."""
        return AllocationTrace()


class Cuda(RankDevice):
    """One GPU of this machine.

    Args:
        index: Number of the GPU.
    """

    kind: DeviceKind = "cuda"
    backend = "nccl"
    # NCCL knows no tags: what one group carries between two ranks is done in order. A receive that waits for
    # a gradient would hold up the activations that this gradient depends on.
    own_groups = True
    # A receive is a kernel: while it waits, what it waits for may need kernels that are still to be launched.
    posts_ahead = False

    def __init__(self, index: int) -> None:
        self._index = index
        self.name = f"cuda:{index}"
        self._past_peak_bytes = 0

    def enter(self) -> None:
        """Make it this thread's device; a new thread begins with the first GPU."""
        _set_up_cuda()
        torch.cuda.set_device(self._index)
        torch.cuda.init()

    def _new_options(self) -> Backend.Options:
        return dist.ProcessGroupNCCL.Options()

    def stopwatch(self) -> Stopwatch:
        """Events in the GPU's streams."""
        return EventStopwatch(partial(torch.cuda.Event, enable_timing=True))  # type: ignore[arg-type]

    def memory_trace(self) -> MemoryTrace:
        """Trace by torch's caching allocator."""
        return DeviceTrace(self)

    def peak_bytes(self) -> int:
        """Peak of bytes that torch's allocator has given out on this GPU in this process."""
        return max(self._past_peak_bytes, torch.cuda.max_memory_allocated(self._index))

    def allocated_bytes(self) -> int:
        """Bytes that it has given out now."""
        return torch.cuda.memory_allocated(self._index)

    def restart_peak(self) -> None:
        """Let the allocator look for a new peak; ours remembers the old one."""
        self._past_peak_bytes = self.peak_bytes()
        torch.cuda.reset_peak_memory_stats(self._index)

    def new_peak_bytes(self) -> int:
        """Most bytes that it has given out since the last restart."""
        return torch.cuda.max_memory_allocated(self._index)


class DeviceTrace(MemoryTrace):
    """Follows what the allocator of a GPU gives out inside of the ``with`` block.

    The allocator counts when a tensor is made or dropped, not when a kernel runs, so nothing has to wait.

    Args:
        device: GPU that is followed.
    """

    def __init__(self, device: Cuda) -> None:
        super().__init__()
        self._device = device
        self._start_bytes = 0

    def start(self) -> None:
        """Begin to count."""
        self._device.restart_peak()
        self._start_bytes = self._device.allocated_bytes()

    def stop(self) -> None:
        """Set the numbers."""
        self.peak_bytes = self._device.new_peak_bytes() - self._start_bytes
        self.net_bytes = self._device.allocated_bytes() - self._start_bytes


CPU = Cpu()


def _set_up_cuda() -> None:
    """Settings that the driver reads once, when a process first asks it for anything."""
    # Streams share hardware queues, 8 by default. Where a waiting receive and the kernel that lets the sender
    # go on share one, neither ends; a rank has a dozen streams.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    # Loading a kernel at its first call may wait for what is under way; a receive may wait for that kernel.
    os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")


def rank_device(kind: DeviceKind, rank: int) -> RankDevice:
    """The device of a rank; on CUDA, that of its number on this machine.

    Args:
        kind: Kind of device of the plan's cluster, or what it is overridden with.
        rank: Rank of the run. Its number on the machine is the same, unless torchrun says otherwise.
    """
    if kind == "cpu":
        return CPU
    return Cuda(int(os.environ["LOCAL_RANK"]) if under_torchrun() else rank)


def check_devices(kind: DeviceKind, ranks: int, field: str) -> None:
    """Refuse devices that this machine has not, or that torch cannot use.

    Args:
        kind: Kind of device that the run needs.
        ranks: Ranks of the run; all are on this machine, unless torchrun says how many are.
        field: Field that asked for the devices.

    Raises:
        SpecError: Names the field, and what is missing here.
    """
    if kind == "cpu":
        return
    _set_up_cuda()
    local = len(_ranks_here(ranks))
    if not torch.cuda.is_available():
        found = "this torch finds none"
    elif torch.cuda.device_count() < local:
        found = f"this machine has {torch.cuda.device_count()}"
    elif ranks > 1 and not dist.is_nccl_available():
        found = "this torch has no NCCL to join them"
    else:
        return
    expected = f"{local} CUDA devices on {platform.node()}, and {found}; --device cpu tries the plan without"
    raise SpecError(field, kind, expected)


def check_memory(kind: DeviceKind, needed_bytes: Sequence[int], field: str) -> None:
    """Refuse what the memory of this machine's devices cannot hold.

    Args:
        kind: Kind of device that the run computes on; the devices are there.
        needed_bytes: Bytes that every rank of the run needs.
        field: Field in which they stand.

    Raises:
        SpecError: Names the field, and what is here.
    """
    here, node = _ranks_here(len(needed_bytes)), platform.node()
    own = needed_bytes[here.start : here.stop]
    if kind == "cpu":  # they share one memory, and need not have the same of it
        memories = [(sum(own), ranks_memory_bytes(len(own)), f"{node}, for {len(own)} ranks together")]
    else:
        gpus = [torch.cuda.get_device_properties(index) for index in range(len(own))]
        memories = [
            (needed, gpu.total_memory, f"cuda:{index} on {node}")
            for index, (needed, gpu) in enumerate(zip(own, gpus, strict=True))
        ]
    for needed, total, whose in memories:
        if needed > total:
            expected = f"at most {show_bytes_down(total)}, the memory of {whose}"
            raise SpecError(field, Quantity(show_bytes_up(needed)), expected)


def _ranks_here(ranks: int) -> range:
    """Ranks of a run that are on this machine: all, unless torchrun says which."""
    if not under_torchrun():
        return range(ranks)
    first = int(os.environ["RANK"]) - int(os.environ.get("LOCAL_RANK", "0"))
    return range(first, first + int(os.environ.get("LOCAL_WORLD_SIZE", ranks)))
