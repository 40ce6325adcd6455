"""What one micro-batch keeps on a stage from its forward to its backward."""

# T tokens of the stream, N targets; widths of a token: D hidden, Q queries, K keys (and values), F of the MLP

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from muxtune.costs.compose import MicrobatchWork
from muxtune.memory.weights import FLOAT32_BYTES, WHOLE, Sharding
from muxtune.model import LAYER_INPUTS, LayerInput, ModelSpec
from muxtune.operators import PHASES, Phase
from muxtune.peft import (
    EMBEDDING,
    Attachment,
    Layers,
    Step,
    attachments,
    backward_layers,
    depth_of,
    embedding_attachments,
    needs_backward,
    runs_of,
)
from muxtune.peft.sites import SiteKind

DROPOUT_KEY_BYTES = 8
"""Per token: the state from which all its masks are computed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MlpWidths:
    """What the activation of an MLP holds, in multiples of the MLP's width."""

    hidden: int
    """Outputs of the first linear: two with a gate."""
    saved: int
    """Kept for the backward."""
    backward: int
    """Alive at once in the backward: the gradients of its output and inputs, and a temporary."""
    saves_output: bool
    """Whether the output, which the last linear reads, is among the saved."""


def mlp_widths(model: ModelSpec) -> MlpWidths:
    """Widths for a backbone's activation, as :mod:`runtime.ops.elementwise` and torch implement it."""
    if model.gated:  # gate and up-projection; activated gate
        return MlpWidths(hidden=2, saved=3, backward=4, saves_output=False)
    if model.activation == "relu":  # keeps its result
        return MlpWidths(hidden=1, saved=1, backward=2, saves_output=True)
    if model.activation == "gelu":  # keeps its argument
        return MlpWidths(hidden=1, saved=1, backward=2, saves_output=False)
    return MlpWidths(hidden=1, saved=2, backward=3, saves_output=False)  # argument and sigmoid


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptBytes:
    """Bytes that stay from a micro-batch's forward to its backward."""

    activation_bytes: int
    """Saved by autograd, with the stage's input and output."""
    logit_bytes: int
    """Log-probabilities of all words at the targets, in float32 or better; on the last stage only."""

    @property
    def total_bytes(self) -> int:
        """Activations and logits together."""
        return self.activation_bytes + self.logit_bytes


def kept_bytes(
    model: ModelSpec,
    layers: Layers,
    *,
    first: bool,
    last: bool,
    work: MicrobatchWork,
    sharding: Sharding = WHOLE,
) -> KeptBytes:
    """What one micro-batch keeps on one rank of a stage.

    A frozen linear keeps its input only for an adapter; norms, attention and activations keep theirs always.
    Before the first trained thing of the first stage nothing has a backward, so nothing is kept.
    """
    runs, begin, depth = backward_layers(model, work.pefts, runs_of(layers), first=first)
    total: float = sum(n * _layer_bytes(model, work, sharding, layer) for layer, n in runs)
    if begin is not None:
        total += _layer_bytes(model, work, sharding, begin[0], trained=depth)
    if first:
        total += _attached_bytes(work, [embedding_attachments(peft, model) for peft in work.pefts])
    message = work.tokens * model.hidden * model.dtype_bytes
    # Masks of attention to carried keys, which the layers share.
    total += model.dtype_bytes * sum(
        calls * sequences * queries * keys for calls, sequences, queries, keys in work.carried_attention
    )
    if any(peft.drops for peft in work.pefts):
        total += work.tokens * DROPOUT_KEY_BYTES  # which the layers share; masks are computed again
    if not last:
        total += message  # the output, which the backward starts from
    if not first and model.rms_norm and model.dtype_bytes != FLOAT32_BYTES:
        total += message  # the input; elsewhere the first norm keeps that very tensor
    logits = 0.0
    if last:
        total += work.targets * norm_bytes_per_token(model)
        logits = logit_bytes(model, work, sharding)
    return KeptBytes(activation_bytes=round(total), logit_bytes=round(logits))


def attention_rows(work: MicrobatchWork) -> float:
    """Slots of queries that attention works on, padding of its rows included."""
    begun = sum(calls * sequences * length for calls, sequences, length in work.attention)
    return begun + sum(calls * sequences * queries for calls, sequences, queries, _ in work.carried_attention)


def gathered_keys(work: MicrobatchWork) -> float:
    """Slots of keys and values of sequences from earlier micro-batches, gathered beside their own rows."""
    return sum(calls * sequences * keys for calls, sequences, _, keys in work.carried_attention)


def rows_are_stream(work: MicrobatchWork) -> bool:
    """Whether attention works on the stream as it lies, without gathering rows from it."""
    # Under a mask, as for carried keys, the result has another order than the stream.
    one_call = len(work.attention) == 1 and not work.carried_attention
    return one_call and attention_rows(work) == work.tokens


def adapted_inputs(model: ModelSpec, work: MicrobatchWork, layer: int = 0) -> set[LayerInput]:
    """What the linears of a layer read whose input an adapter of any task keeps."""
    return {
        each.site.reads
        for peft in work.pefts
        for each in attachments(peft, model, layer)
        if each.keeps_input and each.site.reads is not None
    }


def dropping_tokens(model: ModelSpec, work: MicrobatchWork, reads: LayerInput, layer: int = 0) -> int:
    """Longest span of a task that has dropout on a linear with this input; 0 if none has."""
    return max(
        (
            tokens
            for peft, tokens in zip(work.pefts, work.task_tokens, strict=True)
            if peft.drops
            and any(each.dropout and each.site.reads == reads for each in attachments(peft, model, layer))
        ),
        default=0,
    )


def changed_tokens(
    model: ModelSpec, work: MicrobatchWork, step: Step, reads: LayerInput, layer: int
) -> list[int]:
    """Tokens of each task that changes, out of place, what linears with this input read or give.

    Args:
        model: Backbone.
        work: The micro-batch.
        step: ``REWRITE`` for what the linears read, ``OUTPUT`` for what they give.
        reads: Input of the linears.
        layer: Number of the layer.
    """
    return [
        tokens
        for peft, tokens in zip(work.pefts, work.task_tokens, strict=True)
        if any(
            each.step == step and each.site.kind == "linear" and each.site.reads == reads
            for each in attachments(peft, model, layer)
        )
    ]


def adapter_workspace_bytes(
    model: ModelSpec,
    work: MicrobatchWork,
    reads: LayerInput,
    layer: int,
    phase: Phase,
    sharding: Sharding,
    kind: SiteKind = "linear",
) -> int:
    """Most bytes that one adapter at a linear, or a block, with this input needs while it runs."""
    shard = model.shard(sharding.tp)
    return max(
        (
            tokens * each.workspace_bytes[PHASES.index(phase)]
            for peft, tokens in zip(work.pefts, work.task_tokens, strict=True)
            for each in attachments(peft, shard, layer)
            if each.site.kind == kind and each.site.reads == reads
        ),
        default=0,
    )


def norm_bytes_per_token(model: ModelSpec) -> int:
    """Input and statistics of a norm; Llama's computes in float32 whatever the dtype."""
    if model.rms_norm:
        return (model.hidden + 1) * FLOAT32_BYTES
    return (model.hidden + 2) * model.dtype_bytes


def logit_bytes(model: ModelSpec, work: MicrobatchWork, sharding: Sharding) -> float:
    """One number per target and word; the loss of a bfloat16 backbone is computed in float32."""
    return work.targets * sharding.vocab_rows(model) * max(model.dtype_bytes, FLOAT32_BYTES)


_ATTENTION, _ACTIVATION = LAYER_INPUTS.index("attended"), LAYER_INPUTS.index("inner")
_NORMS = (LAYER_INPUTS.index("attention"), LAYER_INPUTS.index("mlp"))
"""Blocks that these begin."""


def _layer_bytes(
    model: ModelSpec, work: MicrobatchWork, sharding: Sharding, layer: int, *, trained: int = EMBEDDING
) -> float:
    """Bytes of one layer; before depth ``trained`` nothing is trained."""
    rows = attention_rows(work)
    query, kv, ffn = sharding.query_width(model), sharding.kv_width(model), sharding.ffn_width(model)
    mlp = mlp_widths(model)

    def kept(block: int) -> bool:
        return needs_backward(depth_of(block, Step.BEGIN), trained)

    elements = 0.0
    if kept(_ATTENTION):  # queries, keys, values, result and log-sum-exp
        elements += rows * (2 * query + 2 * kv + model.heads // sharding.tp)
        elements += gathered_keys(work) * 2 * kv
    activates = kept(_ACTIVATION)
    if activates:
        elements += work.tokens * ffn * mlp.saved
    # Linears that read the same input keep it once; attention's result needs no copy if it is the stream.
    kept_as_rows = kept(_ATTENTION) and rows_are_stream(work)
    widths: dict[LayerInput, float] = {
        "attention": model.hidden,
        "attended": 0 if kept_as_rows else query,
        "mlp": model.hidden,
        "inner": 0 if activates and mlp.saves_output else ffn,
    }
    elements += work.tokens * sum(widths[name] for name in adapted_inputs(model, work, layer))
    shard = model.shard(sharding.tp)
    attached = _attached_bytes(work, [attachments(peft, shard, layer) for peft in work.pefts])
    norms = sum(kept(block) for block in _NORMS)
    norm = work.tokens * norm_bytes_per_token(model)
    return elements * model.dtype_bytes + attached + norms * norm


def _attached_bytes(work: MicrobatchWork, attached: Sequence[Sequence[Attachment]]) -> int:
    """What adapters keep beside the inputs of base ops; ``attached`` by task."""
    return sum(
        tokens * each.kept_bytes
        for own, tokens in zip(attached, work.task_tokens, strict=True)
        for each in own
    )
