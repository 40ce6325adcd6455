"""Bytes that a pipeline stage needs at its peak (DESIGN: memory model).

weights of the stage, per copy of the backbone
+ per task: adapter, its gradient and AdamW's two moments
+ activations that the in-flight micro-batches keep for their backward
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from muxtune.costs.compose import MicrobatchWork
from muxtune.model import ModelSpec
from muxtune.workload import LoraSpec

ADAPTER_STATES = 4
"""Adapter, gradient and two moments."""

FLOAT32_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class StageMemory:
    """Peak bytes of one stage by what they are for."""

    backbone_bytes: int
    adapter_bytes: int
    """Adapters with gradients and optimizer states."""
    activation_bytes: int

    @property
    def total_bytes(self) -> int:
        """Sum of the parts."""
        return self.backbone_bytes + self.adapter_bytes + self.activation_bytes


def stage_memory(
    model: ModelSpec,
    layers: int,
    *,
    first: bool,
    last: bool,
    instances: int,
    works: Sequence[MicrobatchWork],
    in_flight: int,
    microbatches: Sequence[int],
) -> StageMemory:
    """Peak of one stage.

    Args:
        model: Backbone.
        layers: On this stage.
        first: The stage embeds.
        last: The stage has the head.
        instances: Copies of the backbone.
        works: Micro-batch of each hTask.
        in_flight: Micro-batches whose backward is open at most.
        microbatches: Per hTask and step; more than that of one hTask can only be open with other hTasks.
    """
    adapters = sum(adapter_parameters(model, layers, lora) for work in works for lora in work.loras)
    saved = [saved_bytes(model, layers, first=first, last=last, work=work) for work in works]
    largest = sorted(
        (b for b, m in zip(saved, microbatches, strict=True) for _ in range(min(m, in_flight))), reverse=True
    )
    return StageMemory(
        backbone_bytes=instances * backbone_bytes(model, layers, first=first, last=last),
        adapter_bytes=ADAPTER_STATES * adapters * adapter_dtype_bytes(model),
        activation_bytes=sum(largest[:in_flight]),
    )


def backbone_bytes(model: ModelSpec, layers: int, *, first: bool, last: bool) -> int:
    """Frozen weights of a stage."""
    parameters = layers * model.layer_parameters
    parameters += model.embedding_parameters * first + model.head_parameters * last
    return parameters * model.dtype_bytes


def adapter_parameters(model: ModelSpec, layers: int, lora: LoraSpec) -> int:
    """Trainable parameters of one task on a stage."""
    targets = model.targeted_linears(lora.targets, "targets")
    return layers * sum(lora.r * (linear.in_features + linear.out_features) for linear in targets)


def adapter_dtype_bytes(model: ModelSpec) -> int:
    """Bytes of one adapter element; as in PEFT, float32 beside a bfloat16 backbone."""
    return max(model.dtype_bytes, FLOAT32_BYTES)


def saved_bytes(model: ModelSpec, layers: int, *, first: bool, last: bool, work: MicrobatchWork) -> int:
    """Tensors that one micro-batch keeps on a stage until its backward.

    A frozen linear keeps its input only for an adapter; norms, attention and activations keep theirs always.
    """
    total = layers * _layer_bytes(model, work, trained_from=-1)
    if first:
        # Nothing before the first adapter is trained, so nothing before it has a backward.
        inputs = [_INPUTS.index(_input_of(name)) for name in _adapted(model, work)]
        total += _layer_bytes(model, work, trained_from=min(inputs)) - _layer_bytes(
            model, work, trained_from=-1
        )
    if last:
        total += work.targets * (_norm_bytes_per_token(model) + model.vocab * model.dtype_bytes)
    return round(total)


_INPUTS = ("attention", "attended", "mlp", "inner")
"""Tensors of a layer that linears read, in the order of execution."""


def _layer_bytes(model: ModelSpec, work: MicrobatchWork, *, trained_from: int) -> float:
    """Bytes of one layer; before the linears that read input number ``trained_from`` nothing is trained."""
    rows = sum(calls * sequences * length for calls, sequences, length in work.attention)
    out = model.heads * model.head_dim
    norm = work.tokens * _norm_bytes_per_token(model)
    elements = 0.0
    if trained_from < 1:  # q, k, v, output and log-sum-exp
        elements += rows * (out + 2 * model.kv_heads * model.head_dim + out + model.heads)
    if trained_from < 3:
        elements += work.tokens * model.ffn * (3 if model.gated else 2)
    # Linears that read the same input keep it once; attention's output needs no copy if it is the stream.
    kept_as_rows = trained_from < 1 and len(work.attention) == 1 and rows == work.tokens
    widths = {
        "attention": model.hidden,
        "attended": 0 if kept_as_rows else out,
        "mlp": model.hidden,
        "inner": model.ffn,
    }
    elements += work.tokens * sum(
        widths[name] for name in {_input_of(name) for name in _adapted(model, work)}
    )
    downs = sum(
        tokens * lora.r * len(model.targeted_linears(lora.targets, "targets"))
        for lora, tokens in zip(work.loras, work.task_tokens, strict=True)
    )
    norms = norm * ((trained_from < 0) + (trained_from < 2))
    return elements * model.dtype_bytes + downs * adapter_dtype_bytes(model) + norms


def _adapted(model: ModelSpec, work: MicrobatchWork) -> set[str]:
    return {linear.name for lora in work.loras for linear in model.targeted_linears(lora.targets, "targets")}


def _input_of(linear: str) -> str:
    """Which of :data:`_INPUTS` a linear reads."""
    if linear in {"self_attn.o_proj", "attn.c_proj"}:
        return "attended"
    if linear in {"mlp.down_proj", "mlp.c_proj"}:
        return "inner"
    return "mlp" if linear.startswith("mlp.") else "attention"


def _norm_bytes_per_token(model: ModelSpec) -> int:
    """Input and statistics of a norm; Llama's computes in float32 whatever the dtype."""
    if model.family == "llama":
        return (model.hidden + 1) * FLOAT32_BYTES
    return (model.hidden + 2) * model.dtype_bytes
