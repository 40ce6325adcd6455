"""BitFit in the runtime: differences of biases, added in place to a task's rows (arXiv 2106.10199)."""

# T tokens of the stream, I features in, O features out

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from muxtune.batches import Span
from muxtune.model import ModelSpec
from muxtune.peft import Attachment, TrainedTensor
from muxtune.tasks import PeftTask
from runtime.peft.adapter import Frozen, TaskAdapter
from runtime.peft.frozen_linear import Adder, Saved
from runtime.peft.method import RUNTIME_METHODS, Content, FilePart, Reference, Run
from runtime.peft.plain import PlainReference, tensor_key, write_config, zeros

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class BiasDifference(TaskAdapter):
    """What a task's bias of one linear differs from the frozen one."""

    difference_O: nn.Parameter
    columns: tuple[int, int]
    """Outputs that it adds to."""
    adds: bool
    """Whether this rank adds it: of an input-split linear, whose outputs are terms of a sum, one does."""


class BiasAdder:
    """Differences of several tasks on one linear.

    Args:
        differences: Tokens of each, none of them empty, and the difference.
    """

    keeps_input = False

    def __init__(self, differences: Sequence[tuple[Span, BiasDifference]]) -> None:
        adding = [(span, each) for span, each in differences if each.adds]
        self._pieces = [(span.start, span.stop, *each.columns) for span, each in adding]
        self.parameters: list[Tensor] = [each.difference_O for _, each in adding]

    def add_(self, y_TO: Tensor, x_TI: Tensor) -> Saved:
        """Add all differences; nothing is kept."""
        for (start, stop, first, last), difference_O in zip(self._pieces, self.parameters, strict=True):
            y_TO[start:stop, first:last] += difference_O
        return []

    def add_input_gradients_(
        self, grad_TO: Tensor, dx_TI: Tensor | None, saved: Sequence[Tensor], *, at_once: bool
    ) -> list[Tensor]:
        """Nothing: a bias does not depend on the input."""
        return []

    def gradients(
        self, grad_TO: Tensor, x_TI: Tensor | None, saved: Sequence[Tensor], more: Sequence[Tensor]
    ) -> list[Tensor]:
        """Sums of the output's gradient over each task's tokens."""
        return [
            grad_TO[start:stop, first:last].sum(0, dtype=difference_O.dtype)
            for (start, stop, first, last), difference_O in zip(self._pieces, self.parameters, strict=True)
        ]


@RUNTIME_METHODS.register("bitfit")
class BitFitRuntime:
    """The method in the runtime."""

    def attach(self, each: Attachment, tensors: Mapping[str, nn.Parameter], frozen: Frozen) -> BiasDifference:
        """A task's difference at a linear."""
        adds = each.site.split_by_outputs or frozen.shard.index == 0
        return BiasDifference(tensors["bias"], frozen.columns, adds)

    def adder(self, adapters: Sequence[tuple[Span, TaskAdapter]], keys_T: Tensor | None) -> Adder:
        """The differences of all tasks at one linear."""
        return BiasAdder([(span, each) for span, each in adapters if isinstance(each, BiasDifference)])

    def file_part(self, each: Attachment, tensor: TrainedTensor, layer: int, model: ModelSpec) -> FilePart:
        """A tensor for each bias, under the bias's own name."""
        return FilePart(tensor_key(each, tensor, layer, model))

    def initial(
        self, skeleton: PreTrainedModel, task: PeftTask, model: ModelSpec, folder: Path
    ) -> dict[str, Tensor]:
        """Zeros."""
        write_config(skeleton, task, folder)
        return zeros(skeleton, task, model)

    def reference(self, backbone: PreTrainedModel, task: PeftTask, model: ModelSpec) -> Reference:
        """The backbone with the differences added behind its linears."""
        return PlainReference(backbone, task, model, lambda linear, x, y, own: y + own["bias"])

    def builders(self) -> Mapping[str, Callable[..., tuple[Run, Run]]]:
        """One difference for the profiler."""
        return {"bias": _build_bias}


def _build_bias(content: Content, features: int, tokens: int) -> tuple[Run, Run]:
    y_TO, grad_TO = content.normal(tokens, features), content.normal(tokens, features)
    dtype = torch.promote_types(y_TO.dtype, torch.float32)
    difference = BiasDifference(nn.Parameter(content.normal(features).to(dtype)), (0, features), True)
    adder = BiasAdder([(Span(0, 0, tokens), difference)])
    total_O = torch.zeros(features, dtype=dtype, device=y_TO.device)

    @torch.no_grad()
    def forward() -> object:
        return adder.add_(y_TO, y_TO)

    def backward() -> object:
        (grad_O,) = adder.gradients(grad_TO, None, (), ())
        return total_O.add_(grad_O)  # as autograd does over the micro-batches

    return forward, backward
