"""Low-rank adapters of several tasks on one frozen linear (arXiv 2106.09685).

The frozen product runs once over the whole stream, the adapters on their task's tokens only, so ranks may
differ and no task sees another: task by task, or on a GPU in grouped kernels (:mod:`runtime.kernels`).
:func:`lora_linear_reference` is the plain definition that the tests compare with.
"""

# T tokens of the stream, t tokens of one task, I features in, O features out, R rank

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own abbreviation
from torch import Tensor, nn

from muxtune.alignment import Span
from runtime.autograd import Context
from runtime.gemm import product, thin_product
from runtime.kernels import use_triton
from runtime.kernels.tables import Piece


@dataclass(frozen=True, slots=True)
class LoraPair:
    """One task's factors on one linear: ``y[columns] += scale * B A x``."""

    a_RI: Tensor
    b_OR: Tensor
    scale: float
    columns: tuple[int, int]
    """Outputs that it adds to; the frozen weight may hold several linears that read the same input."""


def lora_linear(
    x_TI: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None,
    spans: Sequence[Span],
    adapters: Sequence[Sequence[LoraPair]],
    *,
    static_shape: bool = True,
) -> Tensor:
    """A frozen linear with the adapters of all tasks, ``[T, O]``.

    Args:
        x_TI: Tokens of all tasks.
        weight_OI: Frozen.
        bias_O: Frozen.
        spans: Tokens of each task.
        adapters: Per span, the task's pairs on this weight; may be empty.
        static_shape: Whether T is that of other micro-batches too.
    """
    pieces: list[Piece] = []
    factors: list[Tensor] = []
    for span, pairs in zip(spans, adapters, strict=True):
        if span.start == span.stop:
            continue  # no sequence of this task in this micro-batch
        for pair in pairs:
            pieces.append((span.start, span.stop, *pair.columns, pair.scale))
            factors += (pair.a_RI, pair.b_OR)
    result: Tensor = _LoraLinear.apply(x_TI, weight_OI, bias_O, static_shape, pieces, *factors)
    return result


class _LoraLinear(torch.autograd.Function):
    """Saves the input only if an adapter needs it for its gradient, and beside it ``A x``."""

    @staticmethod
    def forward(
        ctx: Context,
        x_TI: Tensor,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        static_shape: bool,
        pieces: list[Piece],
        *factors: Tensor,
    ) -> Tensor:
        y_TO = product(x_TI, weight_OI, bias_O, static_shape=static_shape)
        grouped = bool(pieces) and use_triton(x_TI)
        downs = add_updates_(y_TO, x_TI, pieces, factors, grouped=grouped)
        ctx.pieces, ctx.static_shape, ctx.grouped = pieces, static_shape, grouped
        ctx.save_for_backward(weight_OI, x_TI if pieces else None, *factors, *downs)
        return y_TO

    @staticmethod
    def backward(ctx: Context, grad_TO: Tensor) -> tuple[Tensor | None, ...]:
        weight_OI, x_TI, *rest = ctx.saved_tensors
        count = 2 * len(ctx.pieces)
        factors, downs = rest[:count], rest[count:]
        dx_TI = None
        if ctx.needs_input_grad[0]:
            dx_TI = product(grad_TO, weight_OI.t(), static_shape=ctx.static_shape)
        grads = factor_gradients(grad_TO, x_TI, dx_TI, ctx.pieces, factors, downs, grouped=ctx.grouped)
        return dx_TI, None, None, None, None, *grads


def add_updates_(
    y_TO: Tensor, x_TI: Tensor, pieces: Sequence[Piece], factors: Sequence[Tensor], *, grouped: bool
) -> list[Tensor]:
    """Add the updates of all pieces, in place.

    Args:
        y_TO: Output so far.
        x_TI: Input.
        pieces: Where each pair works.
        factors: A and B of each piece in turn.
        grouped: By the Triton kernels, instead of one by one.

    Returns:
        What the gradients need.
    """
    if grouped:
        from runtime.kernels import grouped_lora  # noqa: PLC0415  # needs triton

        return [grouped_lora.add_updates_(y_TO, x_TI, pieces, factors)]
    downs = []
    for i, (start, stop, first, last, scale) in enumerate(pieces):
        a_RI, b_OR = factors[2 * i : 2 * i + 2]
        downs.append(add_update_(y_TO[start:stop, first:last], x_TI[start:stop], a_RI, b_OR, scale))
    return downs


def factor_gradients(
    grad_TO: Tensor,
    x_TI: Tensor,
    dx_TI: Tensor | None,
    pieces: Sequence[Piece],
    factors: Sequence[Tensor],
    downs: Sequence[Tensor],
    *,
    grouped: bool,
) -> list[Tensor]:
    """Gradients of all factors, in their order.

    Args:
        grad_TO: Gradient of the output.
        x_TI: Input.
        dx_TI: Gradient of the input so far; the updates' share is added in place. None if nobody needs it.
        pieces: As in the forward.
        factors: As in the forward.
        downs: What :func:`add_updates_` returned.
        grouped: As in the forward.
    """
    if grouped:
        from runtime.kernels import grouped_lora  # noqa: PLC0415  # needs triton

        return grouped_lora.update_gradients(grad_TO, x_TI, dx_TI, pieces, factors, *downs)
    grads: list[Tensor] = []
    for i, (start, stop, first, last, scale) in enumerate(pieces):
        a_RI, b_OR = factors[2 * i : 2 * i + 2]
        dx_tI = None if dx_TI is None else dx_TI[start:stop]
        grads += update_gradients(
            grad_TO[start:stop, first:last], x_TI[start:stop], dx_tI, a_RI, b_OR, downs[i], scale
        )
    return grads


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


def update_gradients(
    grad_tO: Tensor,
    x_tI: Tensor,
    dx_tI: Tensor | None,
    a_RI: Tensor,
    b_OR: Tensor,
    down_Rt: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of one task's update.

    Args:
        grad_tO: Gradient of the output.
        x_tI: Input of the forward.
        dx_tI: Gradient of the input so far; this update's share is added in place. None if nobody needs it.
        a_RI: Down-projection.
        b_OR: Up-projection.
        down_Rt: What :func:`add_update_` returned.
        scale: ``alpha / r``.

    Returns:
        Gradients of ``a_RI`` and ``b_OR``.
    """
    same = x_tI.dtype == a_RI.dtype
    if not same:
        grad_tO, x_tI = grad_tO.to(a_RI.dtype), x_tI.to(a_RI.dtype)
    ddown_Rt = thin_product(grad_tO, b_OR.t(), scale)
    if dx_tI is not None:
        if same:
            dx_tI.addmm_(ddown_Rt.t(), a_RI)
        else:
            dx_tI.add_(ddown_Rt.t() @ a_RI)
    # Transposed, because the product with few columns takes three times as long as that with few rows.
    return torch.mm(ddown_Rt, x_tI), torch.mm(down_Rt, grad_tO).t()


def lora_linear_reference(
    x_TI: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None,
    spans: Sequence[Span],
    adapters: Sequence[Sequence[LoraPair]],
) -> Tensor:
    """Definition of :func:`lora_linear`: task by task, plain autograd."""
    pieces: list[Tensor] = []
    for span, pairs in zip(spans, adapters, strict=True):
        x_tI = x_TI[span.start : span.stop]
        y_tO = F.linear(x_tI, weight_OI, bias_O)
        for pair in pairs:
            first, last = pair.columns
            update = pair.scale * F.linear(F.linear(x_tI, pair.a_RI), pair.b_OR)
            y_tO = y_tO + F.pad(update, (first, len(weight_OI) - last))
        pieces.append(y_tO)
    return torch.cat(pieces)


class SharedLinear(nn.Module):
    """Frozen linears that read the same input, as one product, with the adapters of all tasks.

    One product of 512 outputs instead of 256 + 128 + 128 also needs one input gradient and no additions.

    Args:
        weights: ``[O, I]`` of each linear by its path in the layer, in the order of their outputs.
        biases: ``[O]`` of each, or empty if they have none.
    """

    def __init__(self, weights: dict[str, Tensor], biases: Sequence[Tensor] = ()) -> None:
        super().__init__()
        # cat copies: a stage must not keep the whole model alive.
        self.weight_OI = nn.Parameter(torch.cat(list(weights.values())), requires_grad=False)
        self.bias_O = nn.Parameter(torch.cat(list(biases)), requires_grad=False) if biases else None
        self.columns: dict[str, tuple[int, int]] = {}
        stop = 0
        for name, weight in weights.items():
            self.columns[name] = (stop, stop + len(weight))
            stop += len(weight)
        self._pairs: dict[str, list[LoraPair]] = {}

    def attach(self, task_id: str, name: str, a_RI: Tensor, b_OR: Tensor, scale: float) -> None:
        """Give a task its pair on the linear ``name``."""
        self._pairs.setdefault(task_id, []).append(LoraPair(a_RI, b_OR, scale, self.columns[name]))

    def forward(self, x_TI: Tensor, spans: Sequence[Span], task_ids: Sequence[str]) -> Tensor:
        """All outputs side by side, ``[T, O]``."""
        adapters = [self._pairs.get(task_id, ()) for task_id in task_ids]
        return lora_linear(x_TI, self.weight_OI, self.bias_O, spans, adapters)
