"""Takes the parts of a GPT2LMHeadModel; its dropouts are off, a frozen backbone is deterministic."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from muxtune.model import ModelSpec
from runtime.elementwise import find_activation
from runtime.layers import DecoderLayer, Embedding, Head, layer_norm
from runtime.lora import SharedLinear

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel


def gpt2_embedding(weights: GPT2LMHeadModel) -> Embedding:
    """Token and position embedding."""
    return Embedding(weights.transformer.wte.weight, weights.transformer.wpe.weight)


def gpt2_layer(spec: ModelSpec, weights: GPT2LMHeadModel, layer: int) -> DecoderLayer:
    """Copy of one layer."""
    source = weights.transformer.h[layer]
    return DecoderLayer(
        attention_norm=layer_norm(source.ln_1),
        qkv=_linear(source.attn.c_attn, "attn.c_attn"),
        attention_out=_linear(source.attn.c_proj, "attn.c_proj"),
        mlp_norm=layer_norm(source.ln_2),
        mlp_in=_linear(source.mlp.c_fc, "mlp.c_fc"),
        mlp_out=_linear(source.mlp.c_proj, "mlp.c_proj"),
        activation=find_activation(spec.activation),
        heads=spec.heads,
        kv_heads=spec.kv_heads,
        rope=None,
    )


def gpt2_head(weights: GPT2LMHeadModel) -> Head:
    """Final norm and head; its own copy where the embeddings are tied."""
    return Head(layer_norm(weights.transformer.ln_f), weights.lm_head.weight)


def _linear(source: Any, name: str) -> SharedLinear:  # noqa: ANN401  # untyped library
    # Conv1D keeps [in, out]; the rows of a linear are its outputs.
    return SharedLinear({name: source.weight.detach().t().contiguous()}, [source.bias.detach()])
