"""Counts, while a stage runs, what its actions hold: exactly, but only where it has not been counted yet."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from muxtune.schedule import Action
from runtime.attention.carried_kv import CarriedKv
from runtime.device.allocations import AllocationTrace, MemoryTrace, SavedBytes
from runtime.reports.footprint import ActionBytes


class ActionMeter:
    """Meters the actions of one stage.

    Every micro-batch of an hTask's first steps is counted, and the temporaries of its first backward and of
    the forwards before it; the steps after that only note their messages, so that a steady iteration is not
    slowed.

    Args:
        microbatches: Micro-batches per hTask and step.
        steps: First steps of each hTask to count.
        new_trace: Makes what follows the device's allocations.
    """

    def __init__(
        self,
        microbatches: Sequence[int],
        steps: int = 1,
        new_trace: Callable[[], MemoryTrace] = AllocationTrace,
    ) -> None:
        self._new_trace = new_trace
        self._to_count = [m * steps for m in microbatches]
        self._kept: dict[tuple[int, int], int] = {}
        self._workspace: dict[str, dict[int, int]] = {"F": {}, "B": {}}
        self._messages: list[int] = []
        self._left_gradients: list[tuple[int, dict[int, int]]] = []

    @property
    def seen(self) -> ActionBytes:
        """Bytes that were counted."""
        return ActionBytes(
            kept=self._kept,
            forward_workspace=self._workspace["F"],
            backward_workspace=self._workspace["B"],
            messages=self._messages,
            left_gradients={
                h: max(sum(each.values()) for htask, each in self._left_gradients if htask == h)
                for h, _ in self._left_gradients
            },
        )

    def traces(self, action: Action) -> bool:
        """Whether it will follow what the rank allocates during an F or B, whoever does."""
        unknown = action.htask not in self._workspace["B"]
        return unknown and (action.kind == "B" or self._to_count[action.htask] > 0)

    def note_messages(self, bytes_: int) -> None:
        """Bytes of the messages at hand in the F or B that runs."""
        self._messages.append(bytes_)

    @contextmanager
    def forward(self, action: Action, backbone: nn.Module) -> Iterator[SavedBytes | None]:
        """Count the forward in the ``with`` block.

        Yields:
            Where to name tensors that are kept beside what autograd saves; None if this is not counted.
        """
        h = action.htask
        if not self._to_count[h]:
            yield None
            return
        self._to_count[h] -= 1
        saved = SavedBytes(backbone)
        if h in self._workspace["B"]:
            with saved:
                yield saved
        else:  # the first backward may be of any of these, and what it frees must have been seen to come
            with self._new_trace() as trace, saved:
                yield saved
            temporary = trace.peak_bytes - trace.net_bytes
            self._workspace["F"][h] = max(temporary, self._workspace["F"].get(h, 0))
        self._kept[h, action.number] = saved.bytes

    def follow(self, action: Action, carried: CarriedKv | None) -> None:
        """Count the gradients that will come to what a carry group has left up to a forward."""
        if carried is None:
            return
        storages: dict[int, int] = {}  # bytes by address; all are there at once

        def note(leaf: Tensor) -> None:
            if leaf.grad is not None:
                storage = leaf.grad.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()

        self._left_gradients.append((action.htask, storages))
        carried.follow(note)

    @contextmanager
    def backward(self, action: Action) -> Iterator[None]:
        """Count the backward in the ``with`` block."""
        if action.htask in self._workspace["B"]:
            yield
            return
        with self._new_trace() as trace:
            yield
        self._workspace["B"][action.htask] = trace.peak_bytes
