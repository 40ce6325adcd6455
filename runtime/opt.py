"""Takes the parts of an OPTForCausalLM; its dropouts are off, a frozen backbone is deterministic."""

from __future__ import annotations

from typing import TYPE_CHECKING

from muxtune.model import ModelSpec
from runtime.layers import DecoderLayer, Embedding, Head, layer_norm, shared_linear
from runtime.sharding import Shard

if TYPE_CHECKING:
    from transformers import OPTForCausalLM


def opt_embedding(spec: ModelSpec, weights: OPTForCausalLM, shard: Shard) -> Embedding:
    """Token and position embedding."""
    decoder = weights.model.decoder
    return Embedding(
        decoder.embed_tokens.weight, decoder.embed_positions.weight, spec.position_offset, shard=shard
    )


def opt_layer(spec: ModelSpec, weights: OPTForCausalLM, layer: int, shard: Shard) -> DecoderLayer:
    """Copy of the rank's part of one layer."""
    source = weights.model.decoder.layers[layer]
    return DecoderLayer(
        attention_norm=layer_norm(source.self_attn_layer_norm),
        qkv=shared_linear(
            spec, source, "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", shard=shard
        ),
        attention_out=shared_linear(spec, source, "self_attn.out_proj", shard=shard),
        mlp_norm=layer_norm(source.final_layer_norm),  # of the layer; the decoder has one of the same name
        mlp_in=shared_linear(spec, source, "fc1", shard=shard),
        mlp_out=shared_linear(spec, source, "fc2", shard=shard),
        spec=spec,
        rope=None,
        shard=shard,
    )


def opt_head(weights: OPTForCausalLM, shard: Shard) -> Head:
    """Final norm and head; its own copy where the embeddings are tied."""
    return Head(layer_norm(weights.model.decoder.final_layer_norm), weights.lm_head.weight, shard=shard)
