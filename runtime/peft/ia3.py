"""IA3 in the runtime: vectors that multiply a task's rows (arXiv 2205.05638)."""

# t tokens of one task, F features that are multiplied

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from muxtune.batches import Span
from muxtune.model import ModelSpec
from muxtune.peft import Attachment, TrainedTensor, module_path
from muxtune.peft.ia3 import Ia3Spec, feedforward_paths
from muxtune.tasks import PeftTask
from runtime.ops.autograd import Context
from runtime.peft.adapter import Frozen, TaskAdapter
from runtime.peft.frozen_linear import Adder
from runtime.peft.method import RUNTIME_METHODS, Content, FilePart, Reference, Run
from runtime.peft.peft_library import PeftReference, attach_peft, needs_paths, peft_targets, write_initial

if TYPE_CHECKING:
    from peft import IA3Config
    from transformers import PreTrainedModel


def scaled(y_tF: Tensor, vector_F: Tensor) -> Tensor:
    """``y * vector``, in the dtype of ``y``; computed in the vector's, as peft does."""
    result: Tensor = _Scaled.apply(y_tF, vector_F)
    return result


class _Scaled(torch.autograd.Function):
    """Keeps the task's own rows and features alone: autograd would keep the whole stream that they lie in."""

    @staticmethod
    def forward(ctx: Context, y_tF: Tensor, vector_F: Tensor) -> Tensor:
        own_tF = y_tF if y_tF.untyped_storage().nbytes() == y_tF.nbytes else y_tF.clone()
        ctx.save_for_backward(own_tF, vector_F)
        return (y_tF * vector_F).to(y_tF.dtype)

    @staticmethod
    def backward(ctx: Context, grad_tF: Tensor) -> tuple[Tensor | None, Tensor]:
        own_tF, vector_F = ctx.saved_tensors
        grad_tF = grad_tF.to(vector_F.dtype)
        given_tF = (grad_tF * vector_F).to(own_tF.dtype) if ctx.needs_input_grad[0] else None
        return given_tF, (grad_tF * own_tF).sum(0)


@dataclass(frozen=True, slots=True)
class Ia3Vector(TaskAdapter):
    """One task's vector at one linear."""

    vector: nn.Parameter
    """``[F, 1]`` or ``[1, F]``, as peft has it."""

    def dispatch(self, x_tI: Tensor) -> Tensor:
        """The input of a feed-forward linear, multiplied."""
        return scaled(x_tI, self.vector.flatten())

    def aggregate(self, y_tO: Tensor, x_tI: Tensor, keys_t: Tensor | None) -> Tensor:
        """The output of any other linear, multiplied."""
        return scaled(y_tO, self.vector.flatten())


@RUNTIME_METHODS.register("ia3")
class Ia3Runtime:
    """The method in the runtime."""

    def attach(self, each: Attachment, tensors: Mapping[str, nn.Parameter], frozen: Frozen) -> Ia3Vector:
        """A task's vector at a linear."""
        return Ia3Vector(tensors["ia3_l"])

    def adder(self, adapters: Sequence[tuple[Span, TaskAdapter]], keys_T: Tensor | None) -> Adder | None:
        """None: nothing is added."""
        return None

    def file_part(self, each: Attachment, tensor: TrainedTensor, layer: int, model: ModelSpec) -> FilePart:
        """A tensor of its own for each vector."""
        return FilePart(f"base_model.model.{model.layer_prefix}.{layer}.{each.site.path}.{tensor.name}")

    def initial(
        self, skeleton: PreTrainedModel, task: PeftTask, model: ModelSpec, folder: Path
    ) -> dict[str, Tensor]:
        """Ones."""
        return write_initial(skeleton, _config(task, model), task.seed, folder, task.peft.init)

    def reference(self, backbone: PreTrainedModel, task: PeftTask, model: ModelSpec) -> Reference:
        """Peft's own model."""
        return PeftReference(attach_peft(backbone, _config(task, model), task.seed, task.peft.init))

    def builders(self) -> Mapping[str, Callable[..., tuple[Run, Run]]]:
        """One vector for the profiler."""
        return {"ia3": _build_vector}


def _config(task: PeftTask, model: ModelSpec) -> IA3Config:
    """The method as peft configures it."""
    from peft import IA3Config  # noqa: PLC0415  # seconds to import

    assert isinstance(task.peft, Ia3Spec)
    feedforward = list(task.peft.feedforward)
    if needs_paths(task.peft):
        feedforward = [
            module_path(model, layer, path)
            for layer in range(model.layers)
            for path in sorted(feedforward_paths(task.peft, model, layer))
        ]
    return IA3Config(
        task_type="CAUSAL_LM",
        target_modules=peft_targets(task.peft, model),
        feedforward_modules=feedforward,
        fan_in_fan_out=model.transposed_weights,
    )


def _build_vector(content: Content, features: int, width: int, tokens: int) -> tuple[Run, Run]:
    """A vector on some columns of a product, which are put back among the others, and the rows likewise."""
    y_tO = content.normal(tokens, width, requires_grad=True)
    vector_F = nn.Parameter(content.normal(features).to(torch.promote_types(y_tO.dtype, torch.float32)))
    grad_tO = content.normal(tokens, width)
    results: list[Tensor] = []

    def forward() -> object:
        (rows_tO,) = y_tO.split([tokens])
        if features < width:
            own_tF, rest = rows_tO.split([features, width - features], dim=1)
            rows_tO = torch.cat([scaled(own_tF, vector_F), rest], dim=1)
        else:
            rows_tO = scaled(rows_tO, vector_F)
        results[:] = [torch.cat([rows_tO])]
        return results

    def backward() -> object:
        return torch.autograd.grad(results, [y_tO, vector_F], [grad_tO], retain_graph=True)

    forward()
    return forward, backward
