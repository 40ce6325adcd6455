"""Takes the parts of a GPT2LMHeadModel; its dropouts are off, a frozen backbone is deterministic."""

from __future__ import annotations

from typing import TYPE_CHECKING

from muxtune.model import ModelSpec
from runtime.layers import DecoderLayer, Embedding, Head, layer_norm, shared_linear
from runtime.sharding import Shard

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel


def gpt2_embedding(weights: GPT2LMHeadModel, shard: Shard) -> Embedding:
    """Token and position embedding."""
    return Embedding(weights.transformer.wte.weight, weights.transformer.wpe.weight, shard=shard)


def gpt2_layer(spec: ModelSpec, weights: GPT2LMHeadModel, layer: int, shard: Shard) -> DecoderLayer:
    """Copy of the rank's part of one layer."""
    source = weights.transformer.h[layer]
    return DecoderLayer(
        attention_norm=layer_norm(source.ln_1),
        qkv=shared_linear(spec, source, "attn.c_attn", shard=shard),
        attention_out=shared_linear(spec, source, "attn.c_proj", shard=shard),
        mlp_norm=layer_norm(source.ln_2),
        mlp_in=shared_linear(spec, source, "mlp.c_fc", shard=shard),
        mlp_out=shared_linear(spec, source, "mlp.c_proj", shard=shard),
        spec=spec,
        rope=None,
        shard=shard,
    )


def gpt2_head(weights: GPT2LMHeadModel, shard: Shard) -> Head:
    """Final norm and head; its own copy where the embeddings are tied."""
    return Head(layer_norm(weights.transformer.ln_f), weights.lm_head.weight, shard=shard)
