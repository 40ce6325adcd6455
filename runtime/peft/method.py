"""What executes a PEFT method, and the registry of all that do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeAlias

from torch import Tensor, nn

from muxtune.batches import Span
from muxtune.model import ModelSpec
from muxtune.peft import Attachment, TrainedTensor
from muxtune.support.registry import Registry
from muxtune.tasks import PeftTask
from runtime.peft.adapter import Frozen, TaskAdapter
from runtime.peft.frozen_linear import Adder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Run: TypeAlias = Callable[[], object]


@dataclass(frozen=True, slots=True)
class FilePart:
    """Where a tensor of an attachment lies in the file of an adapter."""

    key: str
    """Name of the file's tensor."""
    dim: int = 0
    start: int | None = None
    """Where it begins in that dimension; None if it is all of the file's tensor."""
    places: str | None = None
    """Name of the file's tensor ``[2, N]`` with the place of each trained entry in the frozen weight, as
    transformers has it; it is not trained."""


class Content(Protocol):
    """Random tensors in the dtype of a backbone, for operators that are measured."""

    @property
    def model(self) -> ModelSpec:
        """The backbone."""
        ...

    @property
    def device(self) -> str:
        """Where the tensors lie."""
        ...

    def normal(self, *shape: int, requires_grad: bool = False) -> Tensor:
        """Normally distributed numbers."""
        ...


class Reference(Protocol):
    """A task alone, in somebody else's implementation."""

    @property
    def module(self) -> nn.Module:
        """A causal language model of transformers with the adapter, in evaluation mode."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Copy of the adapter under the keys of its file."""
        ...

    def enter(self, step: int, first: int, lengths: Sequence[int]) -> None:
        """Prepare for a micro-batch, as by taking its masks of dropout.

        Args:
            step: Number of the optimizer step.
            first: Place of its first sequence in the global batch.
            lengths: Tokens of its sequences, which are padded to the longest.
        """
        ...


class RuntimeMethod(Protocol):
    """Counterpart of a :class:`muxtune.peft.PeftMethod` under the same name."""

    def attach(self, each: Attachment, tensors: Mapping[str, nn.Parameter], frozen: Frozen) -> TaskAdapter:
        """A task's adapter at one base op.

        Args:
            each: What is attached, of the whole backbone.
            tensors: The rank's parts of its tensors, by their names in the attachment.
            frozen: The base op.
        """
        ...

    def adder(self, adapters: Sequence[tuple[Span, TaskAdapter]], keys_T: Tensor | None) -> Adder | None:
        """Adapters of this method on one linear in one autograd function, if it has one.

        Args:
            adapters: Tokens, never none, and adapter of each task; only those that add beside the linear.
            keys_T: States of the stream's tokens for masks of dropout.

        Returns:
            None if :meth:`TaskAdapter.update` is to be asked instead. All adapters are of one class.
        """
        ...

    def file_part(self, each: Attachment, tensor: TrainedTensor, layer: int, model: ModelSpec) -> FilePart:
        """Where a tensor lies in ``adapter_model.safetensors``: as peft has it, where it has the method."""
        ...

    def initial(
        self, skeleton: PreTrainedModel, task: PeftTask, model: ModelSpec, folder: Path
    ) -> dict[str, Tensor]:
        """The adapter under the task's seed; its ``adapter_config.json`` is written to the folder.

        Args:
            skeleton: The backbone as transformers builds it, with memory that was never touched.
            task: Task whose adapter it is.
            model: The backbone.
            folder: Folder, which is there.
        """
        ...

    def reference(self, backbone: PreTrainedModel, task: PeftTask, model: ModelSpec) -> Reference:
        """The task alone on the plain backbone: peft's own implementation, or plain torch.

        It shares with the runtime only what the task means.
        """
        ...

    def builders(self) -> Mapping[str, Callable[..., tuple[Run, Run]]]:
        """By operator kind of the method, what builds forward and backward of one operator.

        It is called with a :class:`Content` and the operator's dimensions.
        """
        ...


RUNTIME_METHODS: Registry[RuntimeMethod] = Registry(
    "PEFT method of the runtime",
    group="muxtune.runtime_peft",
    methods=("attach", "adder", "file_part", "initial", "reference", "builders"),
)
"""Registry; the entry point group of other packages is ``muxtune.runtime_peft``."""
