"""Takes the parts of a LlamaForCausalLM."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from muxtune.alignment import row_slots
from muxtune.model import ModelSpec
from runtime.attention import RopeTables
from runtime.elementwise import RmsNorm
from runtime.layers import DecoderLayer, Embedding, Head, shared_linear
from runtime.sharding import Shard

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


def llama_rope(spec: ModelSpec, weights: LlamaForCausalLM, device: str) -> RopeTables:
    """Cosines and sines of all slots of a row, from transformers' module: scaled, in float32, then cast."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding  # noqa: PLC0415  # seconds

    rotary = LlamaRotaryEmbedding(weights.config)
    like = torch.empty(0, dtype=getattr(torch, spec.dtype))
    cos, sin = rotary(like, torch.arange(row_slots(spec.max_positions))[None])
    return RopeTables.build(cos[0].to(device), sin[0].to(device))


def llama_embedding(weights: LlamaForCausalLM, shard: Shard) -> Embedding:
    """Token embedding."""
    return Embedding(weights.model.embed_tokens.weight, shard=shard)


def llama_layer(
    spec: ModelSpec, weights: LlamaForCausalLM, layer: int, rope: RopeTables, shard: Shard
) -> DecoderLayer:
    """Copy of the rank's part of one layer."""
    source = weights.model.layers[layer]
    return DecoderLayer(
        attention_norm=RmsNorm(source.input_layernorm.weight, spec.norm_eps),
        qkv=shared_linear(
            spec, source, "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", shard=shard
        ),
        attention_out=shared_linear(spec, source, "self_attn.o_proj", shard=shard),
        mlp_norm=RmsNorm(source.post_attention_layernorm.weight, spec.norm_eps),
        mlp_in=shared_linear(spec, source, "mlp.gate_proj", "mlp.up_proj", shard=shard),
        mlp_out=shared_linear(spec, source, "mlp.down_proj", shard=shard),
        spec=spec,
        rope=rope,
        shard=shard,
    )


def llama_head(spec: ModelSpec, weights: LlamaForCausalLM, shard: Shard) -> Head:
    """Final norm and head; its own copy where the embeddings are tied."""
    return Head(RmsNorm(weights.model.norm.weight, spec.norm_eps), weights.lm_head.weight, shard=shard)
