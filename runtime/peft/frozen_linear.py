"""A frozen linear, and in one autograd function what adapters add to it."""

# T tokens of the stream, I features in, O features out

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import Protocol

import torch
from torch import Tensor

from runtime.ops.autograd import Context
from runtime.ops.deferred import side_work
from runtime.ops.gemm import product

Saved = list[Tensor | None]


class Adder(Protocol):
    """Adapters of several tasks that read what a frozen linear reads and add to what it gives.

    One is made for each micro-batch and linear. What it needs in the backward it hands back, so that autograd
    keeps it.
    """

    @property
    def parameters(self) -> Sequence[Tensor]:
        """Trained tensors of all its adapters."""
        ...

    @property
    def keeps_input(self) -> bool:
        """Whether its gradients need the linear's input."""
        ...

    def add_(self, y_TO: Tensor, x_TI: Tensor) -> Saved:
        """Add to the linear's output, in place; what the backward needs beside the input."""
        ...

    def add_input_gradients_(
        self, grad_TO: Tensor, dx_TI: Tensor | None, saved: Sequence[Tensor], *, at_once: bool
    ) -> list[Tensor]:
        """Add its share to the gradient of the input, in place.

        Args:
            grad_TO: Gradient of the output.
            dx_TI: Gradient of the input so far. None if nobody needs it.
            saved: What :meth:`add_` handed back.
            at_once: Whether :meth:`gradients` follows at once.

        Returns:
            What :meth:`gradients` needs.
        """
        ...

    def gradients(
        self, grad_TO: Tensor, x_TI: Tensor, saved: Sequence[Tensor], more: Sequence[Tensor]
    ) -> list[Tensor]:
        """Gradients of its parameters, in their order; ``more`` is of :meth:`add_input_gradients_`.

        ``x_TI`` is there if an adapter on the linear keeps it.
        """
        ...


def frozen_linear(
    x_TI: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None = None,
    adders: Sequence[Adder] = (),
    *,
    static_shape: bool = True,
) -> Tensor:
    """A frozen linear with what adapters add, ``[T, O]``.

    Args:
        x_TI: Tokens of all tasks.
        weight_OI: Frozen weight.
        bias_O: Frozen bias.
        adders: Adapters on it.
        static_shape: Whether T is that of other micro-batches too.
    """
    parameters = [parameter for adder in adders for parameter in adder.parameters]
    result: Tensor = _FrozenLinear.apply(x_TI, weight_OI, bias_O, static_shape, adders, *parameters)
    return result


class _FrozenLinear(torch.autograd.Function):
    """Saves the input only if an adapter needs it for its gradient."""

    @staticmethod
    def forward(
        ctx: Context,
        x_TI: Tensor,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        static_shape: bool,
        adders: Sequence[Adder],
        *parameters: Tensor,
    ) -> Tensor:
        y_TO = product(x_TI, weight_OI, bias_O, static_shape=static_shape)
        saved = [adder.add_(y_TO, x_TI) for adder in adders]
        ctx.adders, ctx.static_shape, ctx.parameters = adders, static_shape, parameters
        ctx.sizes = [len(each) for each in saved]
        everything = [tensor for each in saved for tensor in each]
        keeps = any(adder.keeps_input for adder in adders)
        ctx.save_for_backward(weight_OI, x_TI if keeps else None, *everything)
        return y_TO

    @staticmethod
    def backward(ctx: Context, grad_TO: Tensor) -> tuple[Tensor | None, ...]:
        weight_OI, x_TI, *everything = ctx.saved_tensors
        saved = [everything[start:stop] for start, stop in pairwise(accumulate(ctx.sizes, initial=0))]
        dx_TI = None
        if ctx.needs_input_grad[0]:
            dx_TI = product(grad_TO, weight_OI.t(), static_shape=ctx.static_shape)
        side = side_work()
        pairs = list(zip(ctx.adders, saved, strict=True))
        more = [adder.add_input_gradients_(grad_TO, dx_TI, own, at_once=side is None) for adder, own in pairs]

        def gradients() -> list[Tensor]:
            return [
                gradient
                for (adder, own), rest in zip(pairs, more, strict=True)
                for gradient in adder.gradients(grad_TO, x_TI, own, rest)
            ]

        if side is None:
            return dx_TI, None, None, None, None, *gradients()
        side.put(partial(_accumulate, ctx.parameters, gradients))
        return dx_TI, *[None] * (4 + len(ctx.parameters))


@torch.no_grad()  # as in a backward
def _accumulate(parameters: Sequence[Tensor], gradients: Callable[[], Sequence[Tensor]]) -> None:
    """Add gradients to those of earlier micro-batches, as autograd does with what a backward returns."""
    for parameter, gradient in zip(parameters, gradients(), strict=True):
        if parameter.grad is None:
            # In the parameter's layout, which a fused optimizer takes for granted.
            parameter.grad = gradient.contiguous()
        else:
            parameter.grad.add_(gradient)
