"""Takes the parts of an OPTForCausalLM; its dropouts are off, a frozen backbone is deterministic."""

from __future__ import annotations

from muxtune.model import ModelSpec
from runtime.backbone.layers import DecoderLayer, Embedding, Head, Weights, layer_norm, shared_linear
from runtime.distributed.sharding import Shard


def opt_embedding(spec: ModelSpec, weights: Weights, shard: Shard) -> Embedding:
    """Token and position embedding."""
    tokens_VD, positions_PD = (
        weights.get_parameter(f"model.decoder.{name}.weight") for name in ("embed_tokens", "embed_positions")
    )
    return Embedding(tokens_VD, positions_PD, spec.position_offset, shard=shard)


def opt_layer(spec: ModelSpec, weights: Weights, layer: int, shard: Shard) -> DecoderLayer:
    """Copy of the rank's part of one layer."""
    path = f"{spec.layer_prefix}.{layer}"
    return DecoderLayer(
        attention_norm=layer_norm(spec, weights, f"{path}.self_attn_layer_norm"),
        qkv=shared_linear(
            spec, weights, layer, "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", shard=shard
        ),
        attention_out=shared_linear(spec, weights, layer, "self_attn.out_proj", shard=shard),
        mlp_norm=layer_norm(spec, weights, f"{path}.final_layer_norm"),  # the decoder has one too
        mlp_in=shared_linear(spec, weights, layer, "fc1", shard=shard),
        mlp_out=shared_linear(spec, weights, layer, "fc2", shard=shard),
        spec=spec,
        rope=None,
        shard=shard,
    )


def opt_head(spec: ModelSpec, weights: Weights, shard: Shard) -> Head:
    """Final norm and head; its own copy where the embeddings are tied."""
    norm = layer_norm(spec, weights, "model.decoder.final_layer_norm")
    return Head(norm, weights.get_parameter("lm_head.weight"), shard=shard)
