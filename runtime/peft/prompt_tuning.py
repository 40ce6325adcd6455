"""Prompt tuning in the runtime: trained rows in the place of the embeddings of virtual tokens."""

# t tokens of one task, P virtual tokens of a sequence, D hidden size

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from muxtune.model import ModelSpec
from muxtune.peft import Attachment, TrainedTensor
from muxtune.peft.prompt_tuning import PromptTuningSpec
from muxtune.tasks import PeftTask
from runtime.peft.adapter import Frozen, TaskAdapter
from runtime.peft.method import RUNTIME_METHODS, Content, FilePart, Run
from runtime.peft.virtual_tokens import KEY, VirtualTokensRuntime

if TYPE_CHECKING:
    from peft import PromptTuningConfig


@dataclass(frozen=True, slots=True)
class Prompt(TaskAdapter):
    """One task's embeddings of virtual tokens."""

    rows_PD: Tensor

    def embed(self, hidden_tD: Tensor, positions_t: Tensor) -> Tensor:
        """The rows at the first positions of every sequence."""
        last = len(self.rows_PD) - 1
        rows_tD = self.rows_PD.to(hidden_tD.dtype).index_select(0, positions_t.clamp(max=last))
        return torch.where((positions_t <= last)[:, None], rows_tD, hidden_tD)


@RUNTIME_METHODS.register("prompt_tuning")
class PromptTuningRuntime(VirtualTokensRuntime):
    """The method in the runtime."""

    def attach(self, each: Attachment, tensors: Mapping[str, nn.Parameter], frozen: Frozen) -> Prompt:
        """The embeddings."""
        return Prompt(tensors[KEY])

    def file_part(self, each: Attachment, tensor: TrainedTensor, layer: int, model: ModelSpec) -> FilePart:
        """The only tensor."""
        return FilePart(KEY)

    def config(self, task: PeftTask) -> PromptTuningConfig:
        """The method as peft configures it."""
        from peft import PromptTuningConfig  # noqa: PLC0415  # seconds to import

        assert isinstance(task.peft, PromptTuningSpec)
        return PromptTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=task.peft.num_virtual_tokens,
            prompt_tuning_init=task.peft.prompt_tuning_init,
        )

    def builders(self) -> Mapping[str, Callable[..., tuple[Run, Run]]]:
        """A task's embeddings for the profiler."""
        return {"prompt": _build_prompt}


def _build_prompt(content: Content, features: int, rows: int, tokens: int) -> tuple[Run, Run]:
    hidden_tD, grad_tD = content.normal(tokens, features), content.normal(tokens, features)
    # Peft keeps the embeddings of a bfloat16 backbone in float32.
    dtype = torch.promote_types(hidden_tD.dtype, torch.float32)
    rows_PD = content.normal(rows, features).to(dtype).requires_grad_()
    total_PD = torch.zeros_like(rows_PD)
    positions_t = torch.arange(tokens, device=content.device)
    outputs: list[Tensor] = []

    def forward() -> object:
        outputs[:] = [Prompt(rows_PD).embed(hidden_tD, positions_t)]
        return outputs

    def backward() -> object:
        (grad_PD,) = torch.autograd.grad(outputs, rows_PD, grad_tD, retain_graph=True)
        with torch.no_grad():
            return total_PD.add_(grad_PD)  # as autograd does over the micro-batches

    return forward, backward
