"""Bottleneck adapters in the runtime: a small MLP on a task's own tokens, behind or beside a whole block.

Every tensor-parallel rank holds it whole and computes all of it: what it reads and what it joins are whole.
:mod:`runtime.peft.bottleneck_reference` is the plain definition.
"""

# t tokens of one task, D hidden size, S features between the projections

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own abbreviation
from torch import Tensor, nn

from muxtune.batches import Span
from muxtune.model import ModelSpec
from muxtune.peft import Attachment, TrainedTensor
from muxtune.peft.bottleneck import Activation, BottleneckSpec
from muxtune.tasks import PeftTask
from runtime.ops.autograd import Context
from runtime.peft.adapter import Frozen, TaskAdapter
from runtime.peft.bottleneck_reference import PlainReference, drawn_tensors, write_config
from runtime.peft.frozen_linear import Adder
from runtime.peft.method import RUNTIME_METHODS, Content, FilePart, Reference, Run

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class BottleneckAdapter(TaskAdapter):
    """One task's adapter at one block."""

    down_SD: Tensor
    down_S: Tensor
    up_DS: Tensor
    up_D: Tensor
    activation: Activation
    scale: float
    serial: bool

    def aggregate(self, y_tO: Tensor, x_tI: Tensor, keys_t: Tensor | None) -> Tensor:
        """The block's output with what the adapter adds."""
        parts = (self.down_SD, self.down_S, self.up_DS, self.up_D)
        read_tD = None if self.serial else x_tI
        result: Tensor = _Bottleneck.apply(y_tO, read_tD, *parts, self.activation, self.scale)
        return result


class _Bottleneck(torch.autograd.Function):
    """``y + scale f(y)``, or with an input of its own ``y + scale f(x)``.

    Keeps what it reads and what the activation reads; the activation is computed again. What a serial one
    reads is kept by nobody else, so its task's rows are copied: a view would keep all tasks'.
    """

    @staticmethod
    def forward(
        ctx: Context,
        y_tD: Tensor,
        x_tD: Tensor | None,
        down_SD: Tensor,
        down_S: Tensor,
        up_DS: Tensor,
        up_D: Tensor,
        activation: Activation,
        scale: float,
    ) -> Tensor:
        read_tD = y_tD.clone() if x_tD is None else x_tD
        inner_tS = torch.addmm(down_S, read_tD.to(down_SD.dtype), down_SD.t())
        update_tD = torch.addmm(up_D, _ACTIVATIONS[activation](inner_tS), up_DS.t())
        ctx.save_for_backward(read_tD, inner_tS, down_SD, up_DS)
        ctx.activation, ctx.scale, ctx.serial = activation, scale, x_tD is None
        return torch.add(y_tD, update_tD, alpha=scale).to(y_tD.dtype)

    @staticmethod
    def backward(ctx: Context, grad_tD: Tensor) -> tuple[Tensor | None, ...]:
        read_tD, inner_tS, down_SD, up_DS = ctx.saved_tensors
        dtype = down_SD.dtype
        dupdate_tD = grad_tD.to(dtype) * ctx.scale
        with torch.enable_grad():
            inner_tS = inner_tS.detach().requires_grad_()
            active_tS = _ACTIVATIONS[ctx.activation](inner_tS)
        (dinner_tS,) = torch.autograd.grad(active_tS, inner_tS, dupdate_tD @ up_DS)
        dy_tD: Tensor | None = grad_tD
        dx_tD = None
        if ctx.serial and ctx.needs_input_grad[0]:
            dy_tD = torch.addmm(grad_tD.to(dtype), dinner_tS, down_SD).to(grad_tD.dtype)
        elif not ctx.serial and ctx.needs_input_grad[1]:
            dx_tD = (dinner_tS @ down_SD).to(read_tD.dtype)
        gradients = (
            dinner_tS.t() @ read_tD.to(dtype),
            dinner_tS.sum(0),
            dupdate_tD.t() @ active_tS.detach(),
            dupdate_tD.sum(0),
        )
        return dy_tD, dx_tD, *gradients, None, None


@RUNTIME_METHODS.register("bottleneck")
class BottleneckRuntime:
    """The method in the runtime."""

    def attach(
        self, each: Attachment, tensors: Mapping[str, nn.Parameter], frozen: Frozen
    ) -> BottleneckAdapter:
        """A task's adapter on a block."""
        spec = _spec(frozen.task)
        return BottleneckAdapter(
            down_SD=tensors["down.weight"],
            down_S=tensors["down.bias"],
            up_DS=tensors["up.weight"],
            up_D=tensors["up.bias"],
            activation=spec.activation,
            scale=spec.scale,
            serial=spec.placement == "serial",
        )

    def adder(self, adapters: Sequence[tuple[Span, TaskAdapter]], keys_T: Tensor | None) -> Adder | None:
        """Nothing stands beside a linear."""
        return None

    def file_part(self, each: Attachment, tensor: TrainedTensor, layer: int, model: ModelSpec) -> FilePart:
        """A tensor of its own, such as ``model.layers.0.mlp.down.weight``."""
        return FilePart(f"{model.layer_prefix}.{layer}.{each.site.path}.{tensor.name}")

    def initial(
        self, skeleton: PreTrainedModel, task: PeftTask, model: ModelSpec, folder: Path
    ) -> dict[str, Tensor]:
        """Down-projections as ``torch.nn.Linear`` draws them; up-projections are 0: nothing is added yet."""
        write_config(_spec(task), model, str(skeleton.name_or_path), folder)
        return drawn_tensors(_spec(task), model, task.seed)

    def reference(self, backbone: PreTrainedModel, task: PeftTask, model: ModelSpec) -> Reference:
        """Plain modules of torch hooked into the backbone."""
        return PlainReference(backbone, _spec(task), model, task.seed)

    def builders(self) -> Mapping[str, Callable[..., tuple[Run, Run]]]:
        """One adapter for the profiler."""
        return {"bottleneck": _build}


def _spec(task: PeftTask) -> BottleneckSpec:
    assert isinstance(task.peft, BottleneckSpec)
    return task.peft


def _build(content: Content, features: int, size: int, tokens: int) -> tuple[Run, Run]:
    """A serial one, with its rows taken out of the stream and put back."""
    y_tD = content.normal(tokens, features, requires_grad=True)
    dtype = torch.promote_types(y_tD.dtype, torch.float32)
    shapes = ((size, features), (size,), (features, size), (features,))
    parts = [content.normal(*shape).to(dtype).requires_grad_() for shape in shapes]
    sums = [torch.zeros_like(part) for part in parts]
    grad_tD = content.normal(tokens, features)

    def forward() -> Tensor:
        (rows_tD,) = y_tD.split([tokens])
        return torch.cat([_Bottleneck.apply(rows_tD, None, *parts, "gelu", 1.0)])

    output = forward()

    def backward() -> object:
        dy_tD, *gradients = torch.autograd.grad(output, [y_tD, *parts], grad_tD, retain_graph=True)
        for total, gradient in zip(sums, gradients, strict=True):
            total.add_(gradient)  # as autograd does over the micro-batches
        return dy_tD, sums

    return forward, backward
