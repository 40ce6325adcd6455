"""Rotary position embedding of queries and keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RopeTables:
    """Rotary position embedding: ``x cos + swap(x) sin``, ``swap`` exchanging the halves of a head."""

    cos: Tensor
    """``[positions, 1, D]``."""
    sin: Tensor
    """``[positions, 1, D]``, negative in the first half."""
    inverse_sin: Tensor
    """``sin`` of the transposed rotation, which the backward needs."""

    @staticmethod
    def build(cos: Tensor, sin: Tensor) -> RopeTables:
        """Build from the tables ``[positions, D]`` of ``x cos + rotate_half(x) sin``."""
        low, high = sin[:, None].chunk(2, dim=-1)
        return RopeTables(cos[:, None], torch.cat((-low, high), -1), torch.cat((high, -low), -1))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``[..., heads, D]``, rotated."""
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin


def rotate_(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """:func:`rotated` in place."""
    half = x.shape[-1] // 2
    swapped = torch.cat((x[..., half:], x[..., :half]), -1)
    x.mul_(cos).addcmul_(swapped, sin)
