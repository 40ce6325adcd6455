"""LoRA in the runtime: low-rank adapters of several tasks on one frozen linear (arXiv 2106.09685).

The frozen product runs once over the whole stream, the adapters on their task's tokens only, so ranks may
differ and no task sees another. :mod:`runtime.peft.lora_reference` is the plain definition that the tests
compare with.
"""

# T tokens of the stream, t tokens of one task, I features in, O features out, R rank

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from muxtune.batches import Span
from muxtune.model import ModelSpec
from muxtune.peft import Attachment, TrainedTensor
from muxtune.peft.lora import LoraSpec
from muxtune.tasks import PeftTask
from runtime.ops.dropout import Dropout, linear_key
from runtime.ops.kernels import use_triton
from runtime.ops.kernels.tables import Piece
from runtime.peft.adapter import Frozen, TaskAdapter
from runtime.peft.frozen_linear import Adder, Saved, frozen_linear
from runtime.peft.lora_masks import MaskedReference
from runtime.peft.lora_pieces import (
    NO_DROPS,
    Drops,
    add_input_gradient_,
    add_input_gradients_,
    add_update_,
    add_updates_,
    factor_gradients,
    pair_gradients,
)
from runtime.peft.method import RUNTIME_METHODS, Content, FilePart, Reference, Run
from runtime.peft.peft_library import attach_peft, write_initial

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class LoraPair(TaskAdapter):
    """One task's factors on one linear: ``y[columns] += scale * B A x``."""

    a_RI: Tensor
    b_OR: Tensor
    scale: float
    columns: tuple[int, int]
    """Outputs that it adds to; the frozen weight may hold several linears that read the same input."""
    dropout: Dropout | None = None
    """Dropout of ``x``, for A alone."""


class LoraAdder:
    """Pairs of several tasks on one linear.

    Masks of dropout are computed again in the backward. One byte per feature and adapter would be an eighth
    of what a float32 layer keeps, whatever its width; the time is a sixth of a backward's at hidden 256, and
    falls with width.

    Args:
        pairs: Tokens of each pair, none of them empty, and the pair.
        dropout_keys_T: States of the tokens; needed if a pair has dropout.
    """

    def __init__(self, pairs: Sequence[tuple[Span, LoraPair]], dropout_keys_T: Tensor | None = None) -> None:
        self._pieces: list[Piece] = []
        self.parameters: list[Tensor] = []
        self._dropouts: tuple[Dropout | None, ...] = tuple(pair.dropout for _, pair in pairs)
        self._keys_T = dropout_keys_T if any(self._dropouts) else None
        self._grouped = False
        for span, pair in pairs:
            scale = pair.scale if pair.dropout is None else pair.scale * pair.dropout.scale
            self._pieces.append((span.start, span.stop, *pair.columns, scale))
            self.parameters += (pair.a_RI, pair.b_OR)

    def add_(self, y_TO: Tensor, x_TI: Tensor) -> Saved:
        """Add the updates; the states of the tokens and ``A x`` are kept."""
        self._grouped = use_triton(x_TI)
        keys_T, self._keys_T = self._keys_T, None  # from now on autograd has them
        drops = self._drops(keys_T)
        downs = add_updates_(y_TO, x_TI, self._pieces, self.parameters, grouped=self._grouped, drops=drops)
        return [keys_T, *self.parameters, *downs]

    def add_input_gradients_(
        self, grad_TO: Tensor, dx_TI: Tensor | None, saved: Sequence[Tensor], *, at_once: bool
    ) -> list[Tensor]:
        """Add the share of all pairs to the gradient of the input."""
        keys_T, factors, _ = self._parts(saved)
        self._last = self._drops(keys_T, twice=dx_TI is not None and at_once)
        return add_input_gradients_(
            grad_TO, dx_TI, self._pieces, factors, grouped=self._grouped, drops=self._last
        )

    def gradients(
        self, grad_TO: Tensor, x_TI: Tensor, saved: Sequence[Tensor], more: Sequence[Tensor]
    ) -> list[Tensor]:
        """Gradients of all factors."""
        _, factors, downs = self._parts(saved)
        drops, self._last = self._last, NO_DROPS
        return factor_gradients(
            grad_TO, x_TI, self._pieces, factors, downs, more, grouped=self._grouped, drops=drops
        )

    def _drops(self, keys_T: Tensor | None, *, twice: bool = False) -> Drops:
        return Drops(keys_T, self._dropouts, twice=twice) if any(self._dropouts) else NO_DROPS

    def _parts(self, saved: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor], Sequence[Tensor]]:
        keys_T, *rest = saved
        count = len(self.parameters)
        return keys_T, rest[:count], rest[count:]

    _last = NO_DROPS


def lora_linear(
    x_TI: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None,
    spans: Sequence[Span],
    adapters: Sequence[Sequence[LoraPair]],
    *,
    static_shape: bool = True,
    dropout_keys_T: Tensor | None = None,
) -> Tensor:
    """A frozen linear with the adapters of all tasks, ``[T, O]``.

    Args:
        x_TI: Tokens of all tasks.
        weight_OI: Frozen weight.
        bias_O: Frozen bias.
        spans: Tokens of each task.
        adapters: Per span, the task's pairs on this weight; may be empty.
        static_shape: Whether T is that of other micro-batches too.
        dropout_keys_T: States of the tokens; needed if a pair has dropout.
    """
    pairs = [
        (span, pair)
        for span, own in zip(spans, adapters, strict=True)
        if span.start < span.stop  # else no sequence of this task is in this micro-batch
        for pair in own
    ]
    adders = [LoraAdder(pairs, dropout_keys_T)] if pairs else []
    return frozen_linear(x_TI, weight_OI, bias_O, adders, static_shape=static_shape)


@RUNTIME_METHODS.register("lora")
class LoraRuntime:
    """The method in the runtime."""

    def attach(self, each: Attachment, tensors: Mapping[str, nn.Parameter], frozen: Frozen) -> LoraPair:
        """A task's pair on a linear."""
        spec = _spec(frozen.task)
        dropout = None
        if spec.dropout:
            first = frozen.inputs.ranges[0][0]
            dropout = Dropout(spec.dropout, linear_key(frozen.path), first_feature=first)
        a_RI, b_OR = tensors["lora_A.weight"], tensors["lora_B.weight"]
        return LoraPair(a_RI, b_OR, spec.scale, frozen.columns, dropout)

    def adder(self, adapters: Sequence[tuple[Span, TaskAdapter]], keys_T: Tensor | None) -> Adder:
        """The pairs of all tasks at one linear."""
        return LoraAdder([(span, each) for span, each in adapters if isinstance(each, LoraPair)], keys_T)

    def file_part(self, each: Attachment, tensor: TrainedTensor, layer: int, model: ModelSpec) -> FilePart:
        """A tensor of its own for each factor."""
        return FilePart(f"base_model.model.{model.layer_prefix}.{layer}.{each.site.path}.{tensor.name}")

    def initial(
        self, skeleton: PreTrainedModel, task: PeftTask, model: ModelSpec, folder: Path
    ) -> dict[str, Tensor]:
        """What peft starts from."""
        return write_initial(skeleton, peft_config(_spec(task), model), task.seed, folder)

    def reference(self, backbone: PreTrainedModel, task: PeftTask, model: ModelSpec) -> Reference:
        """Peft's own model, with the masks of dropout that the runtime computes."""
        return MaskedReference(attach_peft(backbone, _reference_config(_spec(task), model), task.seed), task)

    def builders(self) -> Mapping[str, Callable[..., tuple[Run, Run]]]:
        """One pair for the profiler."""
        return {"lora": _build_pair}


def _spec(task: PeftTask) -> LoraSpec:
    assert isinstance(task.peft, LoraSpec)
    return task.peft


def peft_config(lora: LoraSpec, model: ModelSpec) -> LoraConfig:
    """The method as peft configures it."""
    from peft import LoraConfig  # noqa: PLC0415  # seconds to import

    return LoraConfig(
        r=lora.r,
        lora_alpha=int(lora.alpha) if lora.alpha.is_integer() else lora.alpha,
        lora_dropout=lora.dropout,
        **_places(lora, model),
        bias="none",
        task_type="CAUSAL_LM",
        fan_in_fan_out=model.transposed_weights,
    )


def _reference_config(lora: LoraSpec, model: ModelSpec) -> LoraConfig:
    """The method as a tenant would configure it who knows nothing of the runtime."""
    from peft import LoraConfig  # noqa: PLC0415  # seconds to import

    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        fan_in_fan_out=model.transposed_weights,
        **_places(lora, model),
    )


def _places(lora: LoraSpec, model: ModelSpec) -> dict[str, Any]:
    """Targets and layers; where layers are chosen, peft wants all linears by their names."""
    everything = lora.targets == ("all-linear",)
    if lora.layers is None:
        return {"target_modules": "all-linear" if everything else list(lora.targets)}
    names = [linear.name for linear in model.linears] if everything else list(lora.targets)
    return {"target_modules": names, "layers_to_transform": list(lora.layers)}


def _build_pair(
    content: Content, in_features: int, out_features: int, r: int, tokens: int
) -> tuple[Run, Run]:
    x_TI, dx_TI = content.normal(tokens, in_features), content.normal(tokens, in_features)
    y_TO, grad_TO = content.normal(tokens, out_features), content.normal(tokens, out_features)
    # Peft keeps the adapters of a bfloat16 backbone in float32.
    dtype = torch.promote_types(x_TI.dtype, torch.float32)
    a_RI, b_OR = content.normal(r, in_features).to(dtype), content.normal(out_features, r).to(dtype)
    sums = torch.zeros_like(a_RI), torch.zeros_like(b_OR)
    down_Rt = add_update_(y_TO, x_TI, a_RI, b_OR, 1.0)

    def forward() -> object:
        return add_update_(y_TO, x_TI, a_RI, b_OR, 1.0)

    def backward() -> object:
        ddown_Rt = add_input_gradient_(grad_TO, dx_TI, a_RI, b_OR, 1.0)
        grads = pair_gradients(grad_TO, x_TI, down_Rt, ddown_Rt)
        for total, grad in zip(sums, grads, strict=True):
            total.add_(grad)  # as autograd does over the micro-batches
        return sums

    return forward, backward
