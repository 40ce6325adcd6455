"""What comes with a low-rank pair: DoRA's magnitudes (arXiv 2402.09353), and trained biases.

With ``V = W + scale B A`` and the norm of each of its rows, DoRA gives ``b + m / |V| * (V x)`` where LoRA
gives ``b + V x``. The norm counts as a constant in the backward, as in the paper (section 4.3) and in peft.
It follows from the tensors alone, so it is renewed after each optimizer step, not in each micro-batch; where
the rank has some of the inputs, squares are summed over the ranks.
"""

# t tokens of one task, I features in, O features out, R rank

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from runtime.ops.autograd import Context
from runtime.ops.dropout import Dropout
from runtime.peft.adapter import TaskAdapter

_BLOCK_ROWS = 1024
"""Rows of a weight that are added to at once: what is computed in between is never as large as a weight."""


@dataclass(slots=True, kw_only=True)
class Direction:
    """``V = W + scale B A`` of one linear, as a rank has it, and the norm of each of its rows."""

    weight_OI: Tensor
    a_RI: Tensor
    b_OR: Tensor
    scale: float
    of_inputs: bool
    """Whether the rank has some of the inputs, and with them a part of each row."""
    norm_O: Tensor = field(init=False)
    """In the dtype of the factors; of whole rows."""

    def renew(self) -> Tensor | None:
        """Compute the norms anew, or the rank's terms of their squares, which are then to be summed."""
        rows = zip(self.weight_OI.split(_BLOCK_ROWS), self.b_OR.split(_BLOCK_ROWS), strict=True)
        a_RI, dtype = self.a_RI.detach(), self.a_RI.dtype
        parts = [
            torch.linalg.vector_norm(torch.addmm(w.to(dtype), b.detach(), a_RI, alpha=self.scale), dim=1)
            for w, b in rows
        ]
        self.norm_O = torch.cat(parts)
        return self.norm_O.square() if self.of_inputs else None

    def renewed(self, squares_O: Tensor) -> None:
        """Take the sums of the squares."""
        self.norm_O = squares_O.sqrt()


@dataclass(slots=True)
class Magnitude(TaskAdapter):
    """DoRA behind a linear and its pair, whose outputs are whole: ``b + m / |V| * (y - b)``."""

    magnitude_O: Tensor
    direction: Direction
    bias_O: Tensor | None
    """Frozen bias of the rank's outputs."""

    def renew(self) -> Tensor | None:
        """Norms, or squares that are to be summed."""
        return self.direction.renew()

    def renewed(self, total: Tensor) -> None:
        """Take the sums."""
        self.direction.renewed(total)

    def aggregate(self, y_tO: Tensor, x_tI: Tensor, keys_t: Tensor | None) -> Tensor:
        """Scaled outputs."""
        factor_O = self.magnitude_O / self.direction.norm_O
        if self.bias_O is None:
            # A copy: autograd would keep a view, and with it what all tasks have there.
            return y_tO.clone() * factor_O
        return (y_tO - self.bias_O) * factor_O + self.bias_O


@dataclass(slots=True)
class DroppedDora(TaskAdapter):
    """DoRA with dropout, as peft has it: ``(m / |V| - 1) W x' + m / |V| * scale B A x'`` is added.

    ``x'`` is the input with dropped features, which the frozen product inside of the update reads as well.
    """

    magnitude_O: Tensor
    direction: Direction
    dropout: Dropout

    def renew(self) -> Tensor | None:
        """Norms, or squares that are to be summed."""
        return self.direction.renew()

    def renewed(self, total: Tensor) -> None:
        """Take the sums."""
        self.direction.renewed(total)

    def update(self, x_tI: Tensor, keys_t: Tensor | None) -> Tensor:
        """What is added; on input-split linears a term, as products with the rank's features are."""
        assert keys_t is not None, "a micro-batch of a task with dropout has the states of its tokens"
        v = self.direction
        dtype = v.a_RI.dtype
        mask_tI = self.dropout.keep(keys_t, x_tI.shape[1]).to(dtype).mul_(self.dropout.scale)
        read_tI = x_tI.to(dtype) * mask_tI
        frozen_tO: Tensor = _FrozenProduct.apply(read_tI, v.weight_OI)
        whole_tO = torch.addmm(frozen_tO, read_tI @ v.a_RI.t(), v.b_OR.t(), alpha=v.scale)
        return torch.addcmul(-frozen_tO, whole_tO, self.magnitude_O / v.norm_O)


@dataclass(slots=True)
class TrainedBias(TaskAdapter):
    """A trained bias behind a linear whose outputs have the frozen one, or none."""

    bias_O: Tensor
    frozen_O: Tensor
    """Frozen bias of the rank's outputs."""

    def aggregate(self, y_tO: Tensor, x_tI: Tensor, keys_t: Tensor | None) -> Tensor:
        """Outputs with the trained bias instead."""
        return y_tO + (self.bias_O - self.frozen_O)


class _FrozenProduct(torch.autograd.Function):
    """``x W^T`` in the dtype of ``x``; a weight that is converted for that is converted again, not kept."""

    @staticmethod
    def forward(ctx: Context, x_tI: Tensor, weight_OI: Tensor) -> Tensor:
        ctx.save_for_backward(weight_OI)
        return x_tI @ weight_OI.to(x_tI.dtype).t()

    @staticmethod
    def backward(ctx: Context, grad_tO: Tensor) -> tuple[Tensor, None]:
        (weight_OI,) = ctx.saved_tensors
        return grad_tO @ weight_OI.to(grad_tO.dtype), None
