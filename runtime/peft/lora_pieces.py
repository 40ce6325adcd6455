"""Arithmetic of low-rank pairs on pieces of a stream: updates, and gradients of inputs and factors.

Piece by piece, or on a GPU in grouped kernels (:mod:`runtime.ops.kernels`).
"""

# T tokens of the stream, t tokens of one task, I features in, O features out, R rank

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from runtime.ops.dropout import Dropout, kept_input
from runtime.ops.gemm import thin_product
from runtime.ops.kernels.tables import Piece

if TYPE_CHECKING:
    from runtime.ops.kernels.grouped_lora import Masks


@dataclass(frozen=True, slots=True)
class Drops:
    """Dropout of pieces of a stream."""

    keys_T: Tensor | None = None
    """States of the tokens, see :mod:`runtime.ops.dropout`; None if no piece has dropout."""
    dropouts: tuple[Dropout | None, ...] = ()
    """Dropout of each piece; empty if no piece has any."""
    twice: bool = False
    """Whether every mask is asked for twice, soon after each other, and kept in between."""
    _masks: dict[int, Tensor] = field(default_factory=dict)

    def of(self, i: int) -> Dropout | None:
        """Dropout of piece ``i``."""
        return self.dropouts[i] if self.dropouts else None

    def keep(self, i: int, piece: Piece, features: int) -> Tensor | None:
        """Kept features of its tokens, ``[t, features]`` uint8; None without dropout."""
        dropout = self.of(i)
        if dropout is None:
            return None
        if i in self._masks:
            return self._masks.pop(i)
        assert self.keys_T is not None, "a micro-batch of a task with dropout has the states of its tokens"
        keep_tI = dropout.keep(self.keys_T[piece[0] : piece[1]], features)
        if self.twice:
            self._masks[i] = keep_tI
        return keep_tI


NO_DROPS = Drops()


def add_updates_(
    y_TO: Tensor,
    x_TI: Tensor,
    pieces: Sequence[Piece],
    factors: Sequence[Tensor],
    *,
    grouped: bool,
    drops: Drops = NO_DROPS,
) -> list[Tensor]:
    """Add the updates of all pieces, in place.

    Args:
        y_TO: Output so far.
        x_TI: Input of the linear.
        pieces: Where each pair works; the scale of one with dropout has that of what is kept in it.
        factors: A and B of each piece in turn.
        grouped: Whether the Triton kernels update all pieces together, instead of one by one.
        drops: Dropout of the pieces.

    Returns:
        What the gradients need.
    """
    if grouped:
        from runtime.ops.kernels import grouped_lora  # noqa: PLC0415  # needs triton

        return [grouped_lora.add_updates_(y_TO, x_TI, pieces, factors, _masks(drops))]
    downs: list[Tensor] = []
    for i, piece in enumerate(pieces):
        start, stop, first, last, scale = piece
        a_RI, b_OR = factors[2 * i : 2 * i + 2]
        x_tI = kept_input(x_TI[start:stop], drops.keep(i, piece, x_TI.shape[1]))
        downs.append(add_update_(y_TO[start:stop, first:last], x_tI, a_RI, b_OR, scale))
    return downs


def add_input_gradients_(
    grad_TO: Tensor,
    dx_TI: Tensor | None,
    pieces: Sequence[Piece],
    factors: Sequence[Tensor],
    *,
    grouped: bool,
    drops: Drops = NO_DROPS,
) -> list[Tensor]:
    """Add the share of all updates to the gradient of the input, in place.

    Args:
        grad_TO: Gradient of the output.
        dx_TI: Gradient of the input so far. None if nobody needs it.
        pieces: Pieces of the forward.
        factors: Factors of the forward.
        grouped: Whether the Triton kernels were used in the forward.
        drops: Dropout of the forward.

    Returns:
        What the gradients of the factors need.
    """
    if grouped:
        from runtime.ops.kernels import grouped_lora  # noqa: PLC0415  # needs triton

        return [grouped_lora.add_input_gradients_(grad_TO, dx_TI, pieces, factors, _masks(drops))]
    ddowns: list[Tensor] = []
    for i, piece in enumerate(pieces):
        start, stop, first, last, scale = piece
        a_RI, b_OR = factors[2 * i : 2 * i + 2]
        dx_tI = None if dx_TI is None else dx_TI[start:stop]
        keep_tI = None if dx_TI is None else drops.keep(i, piece, dx_TI.shape[1])
        ddowns.append(add_input_gradient_(grad_TO[start:stop, first:last], dx_tI, a_RI, b_OR, scale, keep_tI))
    return ddowns


def factor_gradients(
    grad_TO: Tensor,
    x_TI: Tensor,
    pieces: Sequence[Piece],
    factors: Sequence[Tensor],
    downs: Sequence[Tensor],
    ddowns: Sequence[Tensor],
    *,
    grouped: bool,
    drops: Drops = NO_DROPS,
) -> list[Tensor]:
    """Gradients of all factors, in their order.

    Args:
        grad_TO: Gradient of the output.
        x_TI: Input of the linear.
        pieces: Pieces of the forward.
        factors: Factors of the forward.
        downs: What :func:`add_updates_` returned.
        ddowns: What :func:`add_input_gradients_` returned.
        grouped: Whether the Triton kernels were used in the forward.
        drops: Dropout of the forward.
    """
    if grouped:
        from runtime.ops.kernels import grouped_lora  # noqa: PLC0415  # needs triton

        (down_n,), (ddown_n,) = downs, ddowns
        masks = _masks(drops)
        return grouped_lora.factor_gradients(grad_TO, x_TI, pieces, factors, down_n, ddown_n, masks)
    grads: list[Tensor] = []
    for i, (piece, down_Rt, ddown_Rt) in enumerate(zip(pieces, downs, ddowns, strict=True)):
        start, stop, first, last, _ = piece
        x_tI = kept_input(x_TI[start:stop], drops.keep(i, piece, x_TI.shape[1]))
        grads += pair_gradients(grad_TO[start:stop, first:last], x_tI, down_Rt, ddown_Rt)
    return grads


def _masks(drops: Drops) -> Masks | None:
    """What the kernels need to know."""
    if not any(drops.dropouts):
        return None
    from runtime.ops.kernels.grouped_lora import Masks  # noqa: PLC0415  # needs triton

    assert drops.keys_T is not None, "a micro-batch of a task with dropout has the states of its tokens"
    return Masks(drops.keys_T, drops.dropouts)


def add_update_(y_tO: Tensor, x_tI: Tensor, a_RI: Tensor, b_OR: Tensor, scale: float) -> Tensor:
    """Add one task's update to its tokens, in place.

    Adapters may have more precision than the backbone (PEFT keeps those of a bfloat16 backbone in float32);
    then the update is computed in theirs and rounded once, as PEFT does.

    Returns:
        ``scale * A x``, ``[R, t]``, which the gradients need.
    """
    same = x_tI.dtype == a_RI.dtype
    down_Rt = thin_product(x_tI if same else x_tI.to(a_RI.dtype), a_RI, scale)
    if same:
        y_tO.addmm_(down_Rt.t(), b_OR.t())
    else:
        y_tO.add_(down_Rt.t() @ b_OR.t())
    return down_Rt


def add_input_gradient_(
    grad_tO: Tensor,
    dx_tI: Tensor | None,
    a_RI: Tensor,
    b_OR: Tensor,
    scale: float,
    keep_tI: Tensor | None = None,
) -> Tensor:
    """Add the share of one task's update to the gradient of its input, in place.

    Args:
        grad_tO: Gradient of the output.
        dx_tI: Gradient of the input so far. None if nobody needs it.
        a_RI: Down-projection.
        b_OR: Up-projection.
        scale: ``alpha / r``, with dropout times the scale of what is kept.
        keep_tI: Features that dropout kept; None without dropout.

    Returns:
        Gradient of ``A x``, ``[R, t]``, times the scale.
    """
    same = grad_tO.dtype == b_OR.dtype
    ddown_Rt = thin_product(grad_tO if same else grad_tO.to(b_OR.dtype), b_OR.t(), scale)
    if dx_tI is not None:
        if keep_tI is not None:
            dx_tI.add_((ddown_Rt.t() @ a_RI).mul_(keep_tI))
        elif same:
            dx_tI.addmm_(ddown_Rt.t(), a_RI)
        else:
            dx_tI.add_(ddown_Rt.t() @ a_RI)
    return ddown_Rt


def pair_gradients(grad_tO: Tensor, x_tI: Tensor, down_Rt: Tensor, ddown_Rt: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of one task's A and B.

    Args:
        grad_tO: Gradient of the output.
        x_tI: What A read in the forward.
        down_Rt: What :func:`add_update_` returned.
        ddown_Rt: What :func:`add_input_gradient_` returned.
    """
    if x_tI.dtype != down_Rt.dtype:
        grad_tO, x_tI = grad_tO.to(down_Rt.dtype), x_tI.to(down_Rt.dtype)
    # Transposed, because the product with few columns takes three times as long as that with few rows.
    return torch.mm(ddown_Rt, x_tI), torch.mm(down_Rt, grad_tO).t()
