"""Temporaries: what an action needs beyond what it keeps, at its fullest moment."""

# T tokens of the stream, t of one task, N targets, R slots of attention's rows; widths of a token: D hidden,
# Q queries, K keys (and values), F of the MLP, V vocabulary

from __future__ import annotations

from muxtune.cluster import DeviceKind
from muxtune.costs.compose import MicrobatchWork
from muxtune.memory.saved_activations import (
    adapted_inputs,
    adapter_workspace_bytes,
    attention_rows,
    changed_tokens,
    dropping_tokens,
    logit_bytes,
    mlp_widths,
    norm_bytes_per_token,
    rows_are_stream,
)
from muxtune.memory.weights import FLOAT32_BYTES, WHOLE, Sharding, adapter_dtype_bytes
from muxtune.model import ModelSpec
from muxtune.peft import Step

_ADDITION_COPIES: dict[DeviceKind, int] = {"cpu": 2, "cuda": 0}
"""Copies that torch makes to add a tensor in place to one of less precision; GPU kernels cast on the fly."""

_MASK_BYTES: dict[DeviceKind, int] = {"cpu": 1, "cuda": 6}
"""Bytes per feature of a dropout mask while it is computed: a GPU has all its numbers at once, three
times."""


def forward_workspace_bytes(
    model: ModelSpec,
    *,
    last: bool,
    work: MicrobatchWork,
    layer: int = 0,
    sharding: Sharding = WHOLE,
    device: DeviceKind = "cpu",
) -> int:
    """Most bytes of a forward beyond what it will have kept when it ends; ``layer`` is the stage's last.

    The moments that count come at the end, when most is kept already: the activation of the last layer's MLP,
    its last linear, the end of that layer, and the head with logits beside their log-probabilities.
    """
    hidden = _hidden(model, work)
    output = 0.0 if last else hidden  # among the kept, but there only at the very end
    adapted, mlp = adapted_inputs(model, work, layer), mlp_widths(model)
    token_ffn = sharding.ffn_width(model) * model.dtype_bytes
    ffn = work.tokens * token_ffn
    rewritten, scaled = (
        sum(changed_tokens(model, work, step, "inner", layer)) for step in (Step.REWRITE, Step.OUTPUT)
    )
    masked = dropping_tokens(model, work, "inner", layer) * sharding.ffn_width(model)
    own_first, own = (
        adapter_workspace_bytes(model, work, reads, layer, "fwd", sharding) for reads in ("mlp", "inner")
    )
    # Until a layer ends, q|k|v, attended values and the second norm's output are referenced, kept or not.
    leftover = work.tokens * _leftover_width(model, work, layer, sharding) * model.dtype_bytes
    # Where tasks rewrite what the last linear reads, adapters keep that.
    inner = ffn * (not mlp.saves_output and ("inner" not in adapted or rewritten > 0))
    end = leftover + inner + hidden  # the last linear's result, added to the residual
    block = adapter_workspace_bytes(model, work, "mlp", layer, "fwd", sharding, kind="block")
    moments = [end + max(hidden, own, block) - output]
    if mlp.saves_output:
        moments.append(leftover + ffn - output)  # its input, which it does not keep
    if "inner" in adapted and adapter_dtype_bytes(model) > model.dtype_bytes:
        width = max(sharding.ffn_width(model), (1 + _ADDITION_COPIES[device]) * model.hidden)
        moments.append(end - output + max(work.task_tokens) * width * adapter_dtype_bytes(model))
    if own_first:  # at the first linear, before what its activation will keep
        kept = mlp.saved * ffn + ffn * ("inner" in adapted and not mlp.saves_output)
        moments.append(leftover + mlp.hidden * ffn + own_first - kept - output)
    if rewritten:  # rows of these tasks, and with the others' as one tensor
        moments.append(leftover + inner + ffn * ("inner" not in adapted) + rewritten * token_ffn - output)
    if scaled:
        moments.append(end + hidden + scaled * model.hidden * model.dtype_bytes - output)
    if masked:
        copied = adapter_dtype_bytes(model) if adapter_dtype_bytes(model) > model.dtype_bytes else 0
        held = max(_MASK_BYTES[device], 1 + model.dtype_bytes, model.dtype_bytes + copied)
        moments.append(end - output + masked * held)
    if not last:
        return round(max(moments))
    logits = logit_bytes(model, work, sharding)
    head = hidden + work.targets * model.hidden * model.dtype_bytes + logits
    return round(max(max(moments) - _head_kept(model, work, sharding), head))


def backward_workspace_bytes(
    model: ModelSpec,
    *,
    last: bool,
    work: MicrobatchWork,
    layer: int = 0,
    sharding: Sharding = WHOLE,
    device: DeviceKind = "cpu",
) -> int:
    """Most bytes of a backward beyond what the micro-batch has kept until then; ``layer`` as above.

    Layers free what they kept on the way, so the fullest moment is near the start: two gradients of the
    logits, the adapter of the last layer's last linear, its MLP or its attention. The frozen linears add no
    more than that: they have gradients of inputs only.
    """
    mlp, adapted, b = mlp_widths(model), adapted_inputs(model, work, layer), model.dtype_bytes
    ffn, hidden = work.tokens * sharding.ffn_width(model) * b, _hidden(model, work)
    gradient = hidden if last else 0.0  # other stages have it as a message
    moments: list[float] = [ffn + adapter_workspace_bytes(model, work, "inner", layer, "bwd", sharding)]
    if "inner" in adapted and adapter_dtype_bytes(model) > b:
        # In the adapters' precision for one task: its share of the input's gradient, and copies for the
        # addition; later, for the gradients of the factors, the gradient of the output and the input.
        own = sharding.ffn_width(model)
        width = max((1 + _ADDITION_COPIES[device]) * own, model.hidden + own)
        moments.append(ffn + max(work.task_tokens) * width * adapter_dtype_bytes(model))
    masked = dropping_tokens(model, work, "inner", layer) * sharding.ffn_width(model)
    if masked:
        # Mask, and what the adapter adds to the gradient; on a CPU also the mask in its dtype, or copies for
        # the addition. The masked input comes later.
        copies = _ADDITION_COPIES[device] if adapter_dtype_bytes(model) > b else device == "cpu"
        held = max(_MASK_BYTES[device], 1 + (1 + copies) * adapter_dtype_bytes(model))
        moments.append(ffn + masked * held)
    # The last linear is behind it, and so is the input that it kept for an adapter.
    inner_freed = ffn * ("inner" in adapted and not mlp.saves_output)
    rewritten = changed_tokens(model, work, Step.REWRITE, "inner", layer)
    if rewritten:  # gradient of what was rewritten; of one task, that of its rows, and terms of its tensors
        moments.append(ffn - inner_freed + 2 * max(rewritten) * sharding.ffn_width(model) * b)
    inner_freed += sum(rewritten) * sharding.ffn_width(model) * b  # kept for that
    moments.append(mlp.backward * ffn - inner_freed)
    # Gradients of queries, keys and values as attention leaves them, side by side, and in the stream's order.
    width = sharding.query_width(model) + 2 * sharding.kv_width(model)
    attention = (2 * attention_rows(work) + work.tokens * (not rows_are_stream(work))) * width * b
    mlp_freed = mlp.saved * ffn + inner_freed + hidden * ("mlp" in adapted)
    mlp_freed += work.tokens * norm_bytes_per_token(model)
    moments.append(hidden + attention - mlp_freed)
    if not last:
        return round(max(moments))
    fullest = gradient + max(moments) - _head_kept(model, work, sharding)
    return round(max(fullest, 2 * logit_bytes(model, work, sharding)))


def _leftover_width(model: ModelSpec, work: MicrobatchWork, layer: int, sharding: Sharding) -> int:
    """Elements per token before a layer's MLP that are referenced without being kept."""
    query, kv = sharding.query_width(model), sharding.kv_width(model)
    adapted = adapted_inputs(model, work, layer)
    width = model.hidden * ("mlp" not in adapted)  # the second norm's output
    if not rows_are_stream(work):  # gathered, and put back
        width += query + 2 * kv + query * ("attended" not in adapted)
    elif not model.learned_positions:  # rotated in a copy
        width += query + 2 * kv
    if model.rms_norm and model.dtype_bytes != FLOAT32_BYTES:
        width += 2 * model.hidden  # norms keep float32 copies, not the residuals themselves
    return width


def _hidden(model: ModelSpec, work: MicrobatchWork) -> int:
    return work.tokens * model.hidden * model.dtype_bytes


def _head_kept(model: ModelSpec, work: MicrobatchWork, sharding: Sharding) -> float:
    return logit_bytes(model, work, sharding) + work.targets * norm_bytes_per_token(model)
