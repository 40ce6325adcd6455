"""Arrays of the host as tensors of a device."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


def on_device(array: NDArray[Any], device: str) -> Tensor:
    """A tensor with an array's content; on the CPU it is the array's memory.

    To a GPU it is copied from pinned memory and in the order of the current stream, so that the host need not
    wait for what the GPU has still to do. Torch keeps the pinned memory until the copy has been made.
    """
    tensor = torch.from_numpy(array)
    if device.startswith("cuda"):
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
