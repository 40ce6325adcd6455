"""Prefix tuning in the runtime: a layer's keys and values in front of those of the task's sequences.

Attention reads them as it reads those that an earlier micro-batch has left (:mod:`runtime.attention`), so
positions begin behind them, and no rotation is theirs.
"""

# P keys in front, F = 2 K D features of the rank's keys and values

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from muxtune.model import ModelSpec
from muxtune.peft import Attachment, TrainedTensor
from muxtune.peft.prefix_tuning import PrefixTuningSpec
from muxtune.tasks import PeftTask
from runtime.peft.adapter import Frozen, TaskAdapter
from runtime.peft.method import RUNTIME_METHODS, Content, FilePart, Run
from runtime.peft.virtual_tokens import KEY, VirtualTokensRuntime

if TYPE_CHECKING:
    from peft import PrefixTuningConfig


@dataclass(frozen=True, slots=True)
class Prefix(TaskAdapter):
    """One task's keys and values in one layer."""

    kv_PF: Tensor

    def keys_values(self) -> Tensor:
        """The keys and values."""
        return self.kv_PF


@RUNTIME_METHODS.register("prefix_tuning")
class PrefixTuningRuntime(VirtualTokensRuntime):
    """The method in the runtime."""

    def attach(self, each: Attachment, tensors: Mapping[str, nn.Parameter], frozen: Frozen) -> Prefix:
        """The prefix of a layer."""
        return Prefix(tensors[KEY])

    def file_part(self, each: Attachment, tensor: TrainedTensor, layer: int, model: ModelSpec) -> FilePart:
        """The file has the layers side by side, each as keys, then values."""
        return FilePart(KEY, dim=1, start=layer * tensor.shape[1])

    def config(self, task: PeftTask) -> PrefixTuningConfig:
        """The method as peft configures it."""
        from peft import PrefixTuningConfig  # noqa: PLC0415  # seconds to import

        assert isinstance(task.peft, PrefixTuningSpec)
        return PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=task.peft.num_virtual_tokens)

    def builders(self) -> Mapping[str, Callable[..., tuple[Run, Run]]]:
        """A layer's prefix for the profiler."""
        return {"prefix": _build_prefix}


def _build_prefix(content: Content, features: int, keys: int, tokens: int) -> tuple[Run, Run]:
    grad_PF = content.normal(keys, features)
    # Peft keeps the prefix of a bfloat16 backbone in float32.
    kv_PF = grad_PF.to(torch.promote_types(grad_PF.dtype, torch.float32))
    total_PF = torch.zeros_like(kv_PF)

    def forward() -> object:
        return torch.cat([kv_PF.to(grad_PF.dtype)])  # beside the keys of the tokens

    def backward() -> object:
        return total_PF.add_(grad_PF.to(kv_PF.dtype))  # as autograd does over the micro-batches

    return forward, backward
