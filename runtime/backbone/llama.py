"""Takes the parts of a LlamaForCausalLM."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from muxtune.batches import row_slots
from muxtune.model import ModelSpec
from runtime.attention import RopeTables
from runtime.backbone.layers import DecoderLayer, Embedding, Head, Weights, shared_linear
from runtime.distributed.sharding import Shard
from runtime.ops.elementwise import RmsNorm

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def llama_rope(spec: ModelSpec, config: PreTrainedConfig, device: str) -> RopeTables:
    """Cosines and sines of all slots of a row, from transformers' module: scaled, in float32, then cast."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding  # noqa: PLC0415  # seconds

    rotary = LlamaRotaryEmbedding(config)
    like = torch.empty(0, dtype=getattr(torch, spec.dtype))
    cos, sin = rotary(like, torch.arange(row_slots(spec.max_positions))[None])
    return RopeTables.build(cos[0].to(device), sin[0].to(device))


def llama_embedding(weights: Weights, shard: Shard) -> Embedding:
    """Token embedding."""
    return Embedding(weights.get_parameter("model.embed_tokens.weight"), shard=shard)


def llama_layer(
    spec: ModelSpec, weights: Weights, layer: int, rope: RopeTables, shard: Shard
) -> DecoderLayer:
    """Copy of the rank's part of one layer."""
    return DecoderLayer(
        attention_norm=_norm(spec, weights, f"model.layers.{layer}.input_layernorm"),
        qkv=shared_linear(
            spec, weights, layer, "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", shard=shard
        ),
        attention_out=shared_linear(spec, weights, layer, "self_attn.o_proj", shard=shard),
        mlp_norm=_norm(spec, weights, f"model.layers.{layer}.post_attention_layernorm"),
        mlp_in=shared_linear(spec, weights, layer, "mlp.gate_proj", "mlp.up_proj", shard=shard),
        mlp_out=shared_linear(spec, weights, layer, "mlp.down_proj", shard=shard),
        spec=spec,
        rope=rope,
        shard=shard,
    )


def llama_head(spec: ModelSpec, weights: Weights, shard: Shard) -> Head:
    """Final norm and head; its own copy where the embeddings are tied."""
    return Head(_norm(spec, weights, "model.norm"), weights.get_parameter("lm_head.weight"), shard=shard)


def _norm(spec: ModelSpec, weights: Weights, path: str) -> RmsNorm:
    return RmsNorm(weights.get_parameter(f"{path}.weight"), spec.norm_eps)
