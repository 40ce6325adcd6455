"""Bytes that autograd keeps from a forward for its backward, and all that is allocated in a while."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from itertools import accumulate
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.autograd.profiler import profile

from runtime.device.torch_internals import is_profiling


class SavedBytes:
    """Counts what the forwards inside of the ``with`` block keep alive for their backward.

    Storages count once, however many views of them are saved. Parameters do not count.

    Args:
        modules: Modules whose buffers, and parameters seen through views, do not count either.
    """

    def __init__(self, *modules: nn.Module) -> None:
        self._known = {
            tensor.untyped_storage().data_ptr()
            for module in modules
            for tensor in (*module.parameters(), *module.buffers())
        }
        self._storages: dict[int, torch.UntypedStorage] = {}
        self.bytes = 0
        """Bytes of the distinct storages, at the end of the block."""
        self._hooks = saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def hold(self, *tensors: Tensor | None) -> None:
        """Count tensors that the caller keeps for the backward, as if autograd had saved them."""
        for tensor in tensors:
            if tensor is not None:
                self._pack(tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if not isinstance(tensor, nn.Parameter) and storage.data_ptr() not in self._known:
            # Keeping the storage keeps its address from being given out again while we count.
            self._storages[storage.data_ptr()] = storage
        return tensor

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.__exit__(kind, error, trace)
        self.bytes = sum(storage.nbytes() for storage in self._storages.values())
        self._storages.clear()  # the hooks refer to us, so only a garbage collection would free them


class MemoryTrace(ABC):
    """Follows what is allocated inside of the ``with`` block, temporaries inside of operators included."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        """Most that was allocated at once, beyond what was at the start."""
        self.net_bytes = 0
        """What was allocated at the end beyond what was at the start; less than 0 if more was freed."""

    @abstractmethod
    def start(self) -> None:
        """Begin to count."""

    @abstractmethod
    def stop(self) -> None:
        """Set the numbers."""

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class AllocationTrace(MemoryTrace):
    """Follows allocations on CPU; of those that go, only tensors that a trace has seen come.

    Torch's profiler notes them; starting and stopping it takes about three milliseconds. Inside of another
    profile it stays off, and both numbers are 0.
    """

    def __init__(self) -> None:
        super().__init__()
        self._profile: profile | None = None

    def start(self) -> None:
        """Begin to count."""
        if not is_profiling():
            # The profiler's library would write a line per start to stderr; it reads this when it first logs.
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")
            self._profile = profile(use_cpu=True, profile_memory=True, use_kineto=True)
            self._profile.__enter__()

    def stop(self) -> None:
        """Set the numbers."""
        if self._profile is None:
            return
        self._profile.__exit__(None, None, None)
        live = [0, *(live_bytes for _, live_bytes in allocation_curve(self._profile))]
        self.peak_bytes, self.net_bytes = max(live), live[-1]


def allocation_curve(finished: profile) -> list[tuple[int, int]]:
    """(nanoseconds, bytes allocated since the start) at every change that a finished profile has seen."""
    assert finished.kineto_results is not None
    changes = sorted(
        (
            (event.start_ns(), event.nbytes())  # type: ignore[attr-defined]  # torch's stub forgets nbytes
            for event in finished.kineto_results.events()
            if event.name() == "[memory]"
        ),
        key=lambda change: change[0],
    )
    return list(zip((ns for ns, _ in changes), accumulate(bytes_ for _, bytes_ in changes), strict=True))
