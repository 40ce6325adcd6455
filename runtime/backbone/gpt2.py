"""Takes the parts of a GPT2LMHeadModel; its dropouts are off, a frozen backbone is deterministic."""

from __future__ import annotations

from muxtune.model import ModelSpec
from runtime.backbone.layers import DecoderLayer, Embedding, Head, Weights, layer_norm, shared_linear
from runtime.distributed.sharding import Shard


def gpt2_embedding(weights: Weights, shard: Shard) -> Embedding:
    """Token and position embedding."""
    tokens_VD, positions_PD = (weights.get_parameter(f"transformer.{name}.weight") for name in ("wte", "wpe"))
    return Embedding(tokens_VD, positions_PD, shard=shard)


def gpt2_layer(spec: ModelSpec, weights: Weights, layer: int, shard: Shard) -> DecoderLayer:
    """Copy of the rank's part of one layer."""
    return DecoderLayer(
        attention_norm=layer_norm(spec, weights, f"transformer.h.{layer}.ln_1"),
        qkv=shared_linear(spec, weights, layer, "attn.c_attn", shard=shard),
        attention_out=shared_linear(spec, weights, layer, "attn.c_proj", shard=shard),
        mlp_norm=layer_norm(spec, weights, f"transformer.h.{layer}.ln_2"),
        mlp_in=shared_linear(spec, weights, layer, "mlp.c_fc", shard=shard),
        mlp_out=shared_linear(spec, weights, layer, "mlp.c_proj", shard=shard),
        spec=spec,
        rope=None,
        shard=shard,
    )


def gpt2_head(spec: ModelSpec, weights: Weights, shard: Shard) -> Head:
    """Final norm and head; its own copy where the embeddings are tied."""
    norm = layer_norm(spec, weights, "transformer.ln_f")
    return Head(norm, weights.get_parameter("lm_head.weight"), shard=shard)
