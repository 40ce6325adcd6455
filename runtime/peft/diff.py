"""Diff pruning with a fixed mask in the runtime: trained entries of frozen weights (arXiv 2012.07463)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import linear as linear_product

from muxtune.batches import Span
from muxtune.model import ModelSpec
from muxtune.peft import Attachment, TrainedTensor, attachments
from muxtune.peft.sparse import whole_linear
from muxtune.tasks import PeftTask
from runtime.peft.adapter import Frozen, TaskAdapter
from runtime.peft.frozen_linear import Adder
from runtime.peft.method import RUNTIME_METHODS, FilePart, Reference, Run
from runtime.peft.plain import PlainReference, tensor_key, write_config, zeros
from runtime.peft.sparse import BUILDERS, SparseAdder, SparseDifference, attach_entries, draw_places

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@RUNTIME_METHODS.register("diff")
class DiffRuntime:
    """The method in the runtime."""

    def attach(
        self, each: Attachment, tensors: Mapping[str, nn.Parameter], frozen: Frozen
    ) -> SparseDifference:
        """A task's entries at a linear."""
        return attach_entries(tensors["weight.values"], frozen)

    def adder(self, adapters: Sequence[tuple[Span, TaskAdapter]], keys_T: Tensor | None) -> Adder:
        """The entries of all tasks at one linear."""
        return SparseAdder(adapters)

    def file_part(self, each: Attachment, tensor: TrainedTensor, layer: int, model: ModelSpec) -> FilePart:
        """Values, and beside them their places."""
        return FilePart(tensor_key(each, tensor, layer, model), places=_places_key(each, layer, model))

    def initial(
        self, skeleton: PreTrainedModel, task: PeftTask, model: ModelSpec, folder: Path
    ) -> dict[str, Tensor]:
        """Zeros at random places, which are drawn from the task's seed."""
        write_config(skeleton, task, folder)
        return zeros(skeleton, task, model) | _places(task, model)

    def reference(self, backbone: PreTrainedModel, task: PeftTask, model: ModelSpec) -> Reference:
        """The backbone with dense differences, each built from its entries, beside its linears."""

        def add(linear: nn.Module, x: Tensor, y: Tensor, own: Mapping[str, nn.Parameter]) -> Tensor:
            weight, values_N = linear.get_parameter("weight"), own["weight.values"]
            place = _draw(*weight.shape, len(values_N), task.seed).long()
            difference = torch.zeros(weight.shape, dtype=values_N.dtype).index_put(tuple(place), values_N)
            if model.transposed_weights:
                difference = difference.t()
            return y + linear_product(x.to(values_N.dtype), difference)

        return PlainReference(backbone, task, model, add, _places(task, model))

    def builders(self) -> Mapping[str, Callable[..., tuple[Run, Run]]]:
        """One difference for the profiler."""
        return BUILDERS


def _places(task: PeftTask, model: ModelSpec) -> dict[str, Tensor]:
    """Places of a task's entries in the weights as transformers has them; alike for weights of one shape."""
    found: dict[str, Tensor] = {}
    for layer in range(model.layers):
        for each in attachments(task.peft, model, layer):
            linear = whole_linear(model, each.site.path)
            shape = linear.out_features, linear.in_features
            rows, columns = shape[::-1] if model.transposed_weights else shape
            places_2N = _draw(rows, columns, each.parameters, task.seed)
            found[_places_key(each, layer, model)] = places_2N.clone()  # files have no shared tensors
    return found


def _places_key(each: Attachment, layer: int, model: ModelSpec) -> str:
    return f"{model.layer_prefix}.{layer}.{each.site.path}.weight.indices"


_draw = lru_cache(maxsize=32)(draw_places)
