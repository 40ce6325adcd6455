"""How an array comes to a device; a GPU's calls are recorded."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from runtime.ops.to_device import on_device


def test_on_the_cpu_nothing_is_copied():
    array = np.arange(5)
    tensor = on_device(array, "cpu")
    array[0] = 7
    assert tensor.tolist() == [7, 1, 2, 3, 4]
    assert not tensor.is_pinned()


def test_a_gpu_reads_pinned_memory_without_holding_up_the_host(monkeypatch: pytest.MonkeyPatch):
    calls = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        calls.append("pin")
        return tensor

    def move(tensor: torch.Tensor, device: str, *, non_blocking: bool = False) -> torch.Tensor:
        calls.append((device, non_blocking))
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "to", move)
    assert on_device(np.arange(3), "cuda:1").tolist() == [0, 1, 2]
    assert calls == ["pin", ("cuda:1", True)]
