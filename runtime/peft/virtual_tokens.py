"""What prefix and prompt tuning have in common: one tensor in the file, and peft's model as the reference."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from muxtune.batches import Span
from muxtune.model import ModelSpec
from muxtune.tasks import PeftTask
from runtime.peft.adapter import TaskAdapter
from runtime.peft.method import Reference
from runtime.peft.peft_library import attach_peft, peft_state, write_initial

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

KEY = "prompt_embeddings"
"""Name of the tensor in ``adapter_model.safetensors``."""


class VirtualTokensRuntime(ABC):
    """What the runtime does alike for both methods."""

    @abstractmethod
    def config(self, task: PeftTask) -> PeftConfig:
        """The method as peft configures it."""

    def adder(self, adapters: Sequence[tuple[Span, TaskAdapter]], keys_T: Tensor | None) -> None:
        """Nothing adds beside a linear."""
        del adapters, keys_T

    def initial(
        self, skeleton: PreTrainedModel, task: PeftTask, model: ModelSpec, folder: Path
    ) -> dict[str, Tensor]:
        """What peft draws or has saved, in float32 or what more precision the backbone has."""
        state = write_initial(skeleton, self.config(task), task.seed, folder, task.peft.init)
        return {key: tensor.to(_precision(skeleton)) for key, tensor in state.items()}

    def reference(self, backbone: PreTrainedModel, task: PeftTask, model: ModelSpec) -> Reference:
        """Peft's own model."""
        return PromptReference(backbone, self.config(task), task)


class PromptReference:
    """Peft's own model of a task.

    Peft keeps virtual tokens in float32 beside a float64 backbone. Here they are as exact as the backbone, in
    the runtime and in the reference.

    Args:
        backbone: The plain backbone.
        config: The method as peft configures it.
        task: Task that is trained.
    """

    def __init__(self, backbone: PreTrainedModel, config: PeftConfig, task: PeftTask) -> None:
        precision = _precision(backbone)
        model: PeftModel = attach_peft(backbone, config, task.seed, task.peft.init)
        for encoder in model.prompt_encoder.values():
            encoder.to(precision)
        self.module: nn.Module = model.eval()  # the frozen backbone's own dropouts are off, as in the runtime

    def state(self) -> dict[str, Tensor]:
        """Copy of the adapter under peft's keys."""
        return {key: tensor.detach().clone() for key, tensor in peft_state(self.module).items()}

    def enter(self, step: int, first: int, lengths: Sequence[int]) -> None:
        """Nothing: there is no dropout."""


def _precision(backbone: PreTrainedModel) -> torch.dtype:
    return torch.promote_types(backbone.dtype, torch.float32)
