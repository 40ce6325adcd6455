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
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from muxtune.batches import Span
from muxtune.model import ModelSpec
from muxtune.peft import Attachment, TrainedTensor, module_path
from muxtune.peft.lora import FACTOR_A, FACTOR_B, MAGNITUDE, LoraSpec
from muxtune.tasks import PeftTask
from runtime.ops.dropout import Dropout, linear_key
from runtime.ops.kernels import use_triton
from runtime.ops.kernels.tables import Piece
from runtime.peft.adapter import Frozen, TaskAdapter
from runtime.peft.frozen_linear import Adder, Saved, frozen_linear
from runtime.peft.lora_config import peft_config
from runtime.peft.lora_masks import MaskedReference
from runtime.peft.lora_parts import Direction, DroppedDora, Magnitude, TrainedBias
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

    keeps_input = True

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

    def attach(self, each: Attachment, tensors: Mapping[str, nn.Parameter], frozen: Frozen) -> TaskAdapter:
        """A task's pair on a linear, or what comes with it."""
        if each.adapter.kind == "lora_bias":
            assert frozen.bias_O is not None, "a bias is trained where there is one"
            (bias_O,) = tensors.values()
            return TrainedBias(bias_O, frozen.bias_O)
        if each.adapter.kind == "lora_magnitude":
            pair = next(pair for pair in frozen.before if isinstance(pair, LoraPair))
            direction = _direction(each, frozen, pair.a_RI, pair.b_OR, pair.scale)
            return Magnitude(tensors[MAGNITUDE], direction, frozen.bias_O)
        spec = _spec(frozen.task)
        dropout = None
        if spec.dropout:
            first = frozen.inputs.ranges[0][0]
            dropout = Dropout(spec.dropout, linear_key(frozen.path), first_feature=first)
        a_RI, b_OR, scale = tensors[FACTOR_A], tensors[FACTOR_B], spec.scale(frozen.path)
        if each.adapter.kind == "lora_dropped_dora":
            assert dropout is not None, "without, magnitudes are attached by themselves"
            return DroppedDora(tensors[MAGNITUDE], _direction(each, frozen, a_RI, b_OR, scale), dropout)
        return LoraPair(a_RI, b_OR, scale, frozen.columns, dropout)

    def adder(self, adapters: Sequence[tuple[Span, TaskAdapter]], keys_T: Tensor | None) -> Adder | None:
        """The pairs of all tasks at one linear."""
        pairs = [(span, each) for span, each in adapters if isinstance(each, LoraPair)]
        return LoraAdder(pairs, keys_T) if pairs else None

    def file_part(self, each: Attachment, tensor: TrainedTensor, layer: int, model: ModelSpec) -> FilePart:
        """A tensor of its own for each."""
        return FilePart(f"base_model.model.{module_path(model, layer, each.site.path)}.{tensor.name}")

    def initial(
        self, skeleton: PreTrainedModel, task: PeftTask, model: ModelSpec, folder: Path
    ) -> dict[str, Tensor]:
        """What peft starts from."""
        return write_initial(skeleton, peft_config(_spec(task), model), task.seed, folder, task.peft.init)

    def reference(self, backbone: PreTrainedModel, task: PeftTask, model: ModelSpec) -> Reference:
        """Peft's own model, with the masks of dropout that the runtime computes."""
        config = peft_config(_spec(task), model)
        return MaskedReference(attach_peft(backbone, config, task.seed, task.peft.init), task)

    def builders(self) -> Mapping[str, Callable[..., tuple[Run, Run]]]:
        """Operators of one task for the profiler."""
        return {
            "lora": _build_pair,
            "lora_magnitude": _build_magnitude,
            "lora_dropped_dora": _build_dropped_dora,
            "lora_bias": _build_bias,
        }


def _spec(task: PeftTask) -> LoraSpec:
    assert isinstance(task.peft, LoraSpec)
    return task.peft


def _direction(each: Attachment, frozen: Frozen, a_RI: Tensor, b_OR: Tensor, scale: float) -> Direction:
    assert frozen.weight_OI is not None, "pairs are attached to linears"
    of_inputs = not each.site.split_by_outputs
    return Direction(weight_OI=frozen.weight_OI, a_RI=a_RI, b_OR=b_OR, scale=scale, of_inputs=of_inputs)


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


def _build_magnitude(content: Content, out_features: int, tokens: int) -> tuple[Run, Run]:
    direction = _random_direction(content, 8, out_features, 1)
    magnitude_O = torch.ones_like(direction.norm_O, requires_grad=True)
    adapter = Magnitude(magnitude_O, direction, content.normal(out_features))
    return _in_stream(content, out_features, tokens, lambda y_tO: adapter.aggregate(y_tO, y_tO, None))


def _build_bias(content: Content, out_features: int, tokens: int) -> tuple[Run, Run]:
    adapter = TrainedBias(content.normal(out_features, requires_grad=True), content.normal(out_features))
    return _in_stream(content, out_features, tokens, lambda y_tO: adapter.aggregate(y_tO, y_tO, None))


def _build_dropped_dora(
    content: Content, in_features: int, out_features: int, r: int, tokens: int
) -> tuple[Run, Run]:
    """Masks have a kind of their own, so that what is built here has none that are computed."""
    x_tI = content.normal(tokens, in_features, requires_grad=True)
    direction = _random_direction(content, in_features, out_features, r)
    magnitude_O = torch.ones_like(direction.norm_O, requires_grad=True)
    adapter = DroppedDora(magnitude_O, direction, _KeepAll())
    keys_t = torch.zeros(tokens, dtype=torch.int64, device=content.device)
    update = lambda y_tO: y_tO + adapter.update(x_tI, keys_t).to(y_tO.dtype)  # noqa: E731
    return _in_stream(content, out_features, tokens, update)


class _KeepAll(Dropout):
    def __init__(self) -> None:
        super().__init__(0.5, 0)

    def keep(self, keys_t: Tensor, features: int) -> Tensor:
        return torch.ones(len(keys_t), features, dtype=torch.uint8, device=keys_t.device)


def _random_direction(content: Content, in_features: int, out_features: int, r: int) -> Direction:
    weight_OI = content.normal(out_features, in_features)
    # Peft keeps the adapters of a bfloat16 backbone in float32.
    dtype = torch.promote_types(weight_OI.dtype, torch.float32)
    a_RI = content.normal(r, in_features).to(dtype).requires_grad_()
    b_OR = content.normal(out_features, r).to(dtype).requires_grad_()
    direction = Direction(weight_OI=weight_OI, a_RI=a_RI, b_OR=b_OR, scale=1.0, of_inputs=False)
    direction.renew()
    return direction


def _in_stream(
    content: Content, out_features: int, tokens: int, change: Callable[[Tensor], Tensor]
) -> tuple[Run, Run]:
    """A change of the rows of one of two tasks, as a stage makes it; its graph is kept for the backward."""
    y_TO = content.normal(2 * tokens, out_features, requires_grad=True)
    grad_TO = content.normal(2 * tokens, out_features)

    def forward() -> Tensor:
        own_tO, others_tO = y_TO.split(tokens)
        return torch.cat([change(own_tO).to(y_TO.dtype), others_tO])

    result_TO = forward()

    def backward() -> object:
        result_TO.backward(grad_TO, retain_graph=True)  # gradients add up over the micro-batches
        y_TO.grad = None
        return grad_TO

    return forward, backward
