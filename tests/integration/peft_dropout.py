"""Dropout of a task that peft trains alone, written from the text "Dropout" of docs/runtime.md.

Shares no code with the runtime: peft's dropout modules are replaced by ones whose masks come from here.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Numbers = NDArray[np.uint64]


def number(state: Numbers | int, n: Numbers | int) -> Numbers:
    """The n-th number (from 0) that SplitMix64 gives from a state."""
    with np.errstate(over="ignore"):
        z = np.uint64(state) + (np.uint64(n) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def kept_features(
    seed: int, step: int, sequence: int, path: str, length: int, features: int, rate: float
) -> NDArray[np.bool_]:
    """Mask of one sequence at one linear, ``[length, features]``."""
    positions, columns = np.arange(length)[:, None], np.arange(features)[None, :]
    of_sequence = number(number(number(0, seed), step), sequence)
    of_path = int.from_bytes(blake2b(path.encode(), digest_size=8).digest(), "little")
    rows = number(number(of_sequence, positions), of_path)
    quarters = number(rows, columns // 4) >> np.uint64(16 * (columns % 4))
    return (quarters & np.uint64(0xFFFF)) >= np.uint64(round(rate * 65536))


class PeftDropout:
    """Takes over all LoRA dropouts of a model that peft has built."""

    def __init__(self, peft_model: nn.Module, *, rate: float, seed: int) -> None:
        self.rate, self.seed = rate, seed
        self.place = (0, 0)
        """Step, and the sequence in its global batch, that the next forwards are for."""
        for name, module in peft_model.named_modules():
            if rate and hasattr(module, "lora_dropout"):
                path = name.removeprefix("base_model.model.")
                module.lora_dropout = nn.ModuleDict({"default": _OnePath(self, path)})


class _OnePath(nn.Module):
    def __init__(self, owner: PeftDropout, path: str) -> None:
        super().__init__()
        self._owner, self._path = (owner,), path  # in a tuple, as it is no submodule

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        (owner,) = self._owner
        assert x[..., 0].numel() == x.shape[-2], "one sequence at a time"
        mask = kept_features(owner.seed, *owner.place, self._path, *x.shape[-2:], owner.rate)
        return x * torch.from_numpy(mask) / (1 - owner.rate)
