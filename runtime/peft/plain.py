"""Methods that peft does not have: their files, and references in plain torch."""

# B sequences of a padded batch, S its length, O features out

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from muxtune.model import ModelSpec
from muxtune.peft import Attachment, TrainedTensor, attachments
from muxtune.support.files import write_text_atomically
from muxtune.tasks import PeftTask

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG_FILE = "adapter_config.json"

Change = Callable[[nn.Module, Tensor, Tensor, Mapping[str, nn.Parameter]], Tensor]
"""What a method makes of a linear's output: of the linear, its input, its output and the trained tensors."""


def tensor_key(each: Attachment, tensor: TrainedTensor, layer: int, model: ModelSpec) -> str:
    """Name of a tensor in the file: its place in the backbone as transformers names it."""
    return f"{model.layer_prefix}.{layer}.{each.site.path}.{tensor.name}"


def adapter_dtype(backbone: PreTrainedModel) -> torch.dtype:
    """Type of trained tensors: the backbone's, or float32 where that has less precision, as in peft."""
    return torch.promote_types(backbone.dtype, torch.float32)


def zeros(backbone: PreTrainedModel, task: PeftTask, model: ModelSpec) -> dict[str, Tensor]:
    """All trained tensors of a task at zero, under their keys: the backbone as it is."""
    return {
        tensor_key(each, tensor, layer, model): torch.zeros(tensor.shape, dtype=adapter_dtype(backbone))
        for layer in range(model.layers)
        for each in attachments(task.peft, model, layer)
        for tensor in each.tensors
    }


def write_config(skeleton: PreTrainedModel, task: PeftTask, folder: Path) -> None:
    """Write ``adapter_config.json``: the method's parameters, the task's seed and the backbone's name."""
    content = task.peft.model_dump(mode="json")
    content |= {"seed": task.seed, "base_model_name_or_path": skeleton.name_or_path}
    write_text_atomically(folder / CONFIG_FILE, json.dumps(content, indent=2, sort_keys=True) + "\n")


class PlainReference:
    """A task alone: the model of transformers, with a change behind each of its linears.

    Args:
        backbone: The model; it is changed.
        task: Task whose adapter it gets, from zero.
        model: The backbone.
        change: What the method does to the output of a linear.
        fixed: Tensors of the file that are not trained.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        task: PeftTask,
        model: ModelSpec,
        change: Change,
        fixed: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.module = backbone.requires_grad_(False).eval()
        self._fixed = fixed or {}
        self._trained = {key: nn.Parameter(tensor) for key, tensor in zeros(backbone, task, model).items()}
        for number, parameter in enumerate(self._trained.values()):
            backbone.register_parameter(f"trained_{number}", parameter)
        for layer in range(model.layers):
            for each in attachments(task.peft, model, layer):
                own = {t.name: self._trained[tensor_key(each, t, layer, model)] for t in each.tensors}
                linear = backbone.get_submodule(f"{model.layer_prefix}.{layer}.{each.site.path}")
                linear.register_forward_hook(_hook(change, own))

    def state(self) -> dict[str, Tensor]:
        """Copy of the adapter under the keys of its file."""
        trained = {key: parameter.detach().clone() for key, parameter in self._trained.items()}
        return trained | dict(self._fixed)

    def enter(self, step: int, first: int, lengths: Sequence[int]) -> None:
        """Nothing to prepare."""


def _hook(
    change: Change, own: Mapping[str, nn.Parameter]
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    def changed(linear: nn.Module, inputs: tuple[Tensor, ...], y_BSO: Tensor) -> Tensor:
        return change(linear, inputs[0], y_BSO, own).to(y_BSO.dtype)

    return changed
