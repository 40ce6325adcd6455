"""SHiRA in the runtime: trained entries of frozen weights, as peft has them (arXiv 2406.13175)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from muxtune.batches import Span
from muxtune.model import ModelSpec
from muxtune.peft import Attachment, TrainedTensor
from muxtune.peft.shira import ShiraSpec
from muxtune.tasks import PeftTask
from runtime.peft.adapter import Frozen, TaskAdapter
from runtime.peft.frozen_linear import Adder
from runtime.peft.method import RUNTIME_METHODS, FilePart, Reference, Run
from runtime.peft.peft_library import PeftReference, attach_peft, peft_targets, write_initial
from runtime.peft.sparse import BUILDERS, SparseAdder, SparseDifference, attach_entries

if TYPE_CHECKING:
    from peft import ShiraConfig
    from transformers import PreTrainedModel


@RUNTIME_METHODS.register("shira")
class ShiraRuntime:
    """The method in the runtime."""

    def attach(
        self, each: Attachment, tensors: Mapping[str, nn.Parameter], frozen: Frozen
    ) -> SparseDifference:
        """A task's entries at a linear."""
        return attach_entries(tensors["shira_weight"], frozen)

    def adder(self, adapters: Sequence[tuple[Span, TaskAdapter]], keys_T: Tensor | None) -> Adder:
        """The entries of all tasks at one linear."""
        return SparseAdder(adapters)

    def file_part(self, each: Attachment, tensor: TrainedTensor, layer: int, model: ModelSpec) -> FilePart:
        """Values, and beside them their places."""
        path = f"base_model.model.{model.layer_prefix}.{layer}.{each.site.path}"
        return FilePart(f"{path}.{tensor.name}", places=f"{path}.shira_indices")

    def initial(
        self, skeleton: PreTrainedModel, task: PeftTask, model: ModelSpec, folder: Path
    ) -> dict[str, Tensor]:
        """Zeros at random places, which peft draws from the task's seed."""
        return write_initial(skeleton, _config(task, model), task.seed, folder, task.peft.init)

    def reference(self, backbone: PreTrainedModel, task: PeftTask, model: ModelSpec) -> Reference:
        """Peft's own model."""
        return PeftReference(attach_peft(backbone, _config(task, model), task.seed, task.peft.init))

    def builders(self) -> Mapping[str, Callable[..., tuple[Run, Run]]]:
        """One difference for the profiler."""
        return BUILDERS


def _config(task: PeftTask, model: ModelSpec) -> ShiraConfig:
    """The method as peft configures it."""
    from peft import ShiraConfig  # noqa: PLC0415  # seconds to import

    assert isinstance(task.peft, ShiraSpec)
    return ShiraConfig(
        task_type="CAUSAL_LM",
        r=task.peft.r,
        random_seed=task.seed,
        target_modules=peft_targets(task.peft, model),
    )
