"""Takes the parts of a LlamaForCausalLM."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from muxtune.batches import row_slots
from muxtune.model import ModelSpec
from runtime.attention import RopeTables
from runtime.backbone.families.family import FamilyParts
from runtime.backbone.layers import DecoderLayer, Embedding, Head, Weights, shared_linear
from runtime.distributed.sharding import Shard
from runtime.ops.elementwise import RmsNorm

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def _config(spec: ModelSpec, common: dict[str, Any]) -> PreTrainedConfig:
    from transformers import LlamaConfig  # noqa: PLC0415  # seconds to import

    return LlamaConfig(
        hidden_size=spec.hidden,
        intermediate_size=spec.ffn,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        num_key_value_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        hidden_act=spec.activation,
        max_position_embeddings=spec.max_positions,
        rms_norm_eps=spec.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": spec.rope_theta},
        attention_bias=spec.attention_bias,
        mlp_bias=spec.mlp_bias,
        attention_dropout=0.0,
        **common,
    )


def _rope(spec: ModelSpec, config: PreTrainedConfig, device: str) -> RopeTables:
    """Cosines and sines of all slots of a row, from transformers' module: scaled, in float32, then cast."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding  # noqa: PLC0415  # seconds

    rotary = LlamaRotaryEmbedding(config)
    like = torch.empty(0, dtype=getattr(torch, spec.dtype))
    cos, sin = rotary(like, torch.arange(row_slots(spec.max_positions))[None])
    return RopeTables.build(cos[0].to(device), sin[0].to(device))


def _embedding(spec: ModelSpec, weights: Weights, shard: Shard) -> Embedding:
    del spec
    return Embedding(weights.get_parameter("model.embed_tokens.weight"), shard=shard)


def _layer(
    spec: ModelSpec, weights: Weights, layer: int, rope: RopeTables | None, shard: Shard
) -> DecoderLayer:
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


def _head(spec: ModelSpec, weights: Weights, shard: Shard) -> Head:
    return Head(_norm(spec, weights, "model.norm"), weights.get_parameter("lm_head.weight"), shard=shard)


def _norm(spec: ModelSpec, weights: Weights, path: str) -> RmsNorm:
    return RmsNorm(weights.get_parameter(f"{path}.weight"), spec.norm_eps)


LLAMA = FamilyParts(config=_config, rope=_rope, embedding=_embedding, layer=_layer, head=_head)
