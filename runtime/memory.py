"""Bytes that a stage holds: weights, and what autograd keeps from a forward for its backward."""

from __future__ import annotations

from types import TracebackType

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


def parameter_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers; of a stage, the frozen backbone without adapters."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class SavedBytes:
    """Counts what the forwards inside of the ``with`` block keep alive for their backward.

    Storages count once, however many views of them are saved. Parameters do not count.

    Args:
        modules: Whose buffers, and parameters seen through views, do not count either.
    """

    def __init__(self, *modules: nn.Module) -> None:
        self._known = {
            tensor.untyped_storage().data_ptr()
            for module in modules
            for tensor in (*module.parameters(), *module.buffers())
        }
        self._storages: dict[int, torch.UntypedStorage] = {}
        self._hooks = saved_tensors_hooks(self._pack, lambda tensor: tensor)

    @property
    def bytes(self) -> int:
        """Bytes of the distinct storages so far."""
        return sum(storage.nbytes() for storage in self._storages.values())

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
