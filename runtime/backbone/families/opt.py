"""Takes the parts of an OPTForCausalLM; its dropouts are off, a frozen backbone is deterministic."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from muxtune.model import ModelSpec
from runtime.attention import RopeTables
from runtime.backbone.families.family import FamilyParts
from runtime.backbone.layers import DecoderLayer, Embedding, Head, Weights, layer_norm, shared_linear
from runtime.distributed.sharding import Shard

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def _config(spec: ModelSpec, common: dict[str, Any]) -> PreTrainedConfig:
    from transformers import OPTConfig  # noqa: PLC0415  # seconds to import

    return OPTConfig(
        hidden_size=spec.hidden,
        ffn_dim=spec.ffn,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        activation_function=spec.activation,
        max_position_embeddings=spec.max_positions,
        enable_bias=spec.attention_bias,
        dropout=0.0,
        attention_dropout=0.0,
        pad_token_id=None,
        **common,
    )


def _embedding(spec: ModelSpec, weights: Weights, shard: Shard) -> Embedding:
    tokens_VD, positions_PD = (
        weights.get_parameter(f"model.decoder.{name}.weight") for name in ("embed_tokens", "embed_positions")
    )
    return Embedding(tokens_VD, positions_PD, spec.position_offset, shard=shard)


def _layer(
    spec: ModelSpec, weights: Weights, layer: int, rope: RopeTables | None, shard: Shard
) -> DecoderLayer:
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
        rope=rope,
        shard=shard,
    )


def _head(spec: ModelSpec, weights: Weights, shard: Shard) -> Head:
    norm = layer_norm(spec, weights, "model.decoder.final_layer_norm")
    return Head(norm, weights.get_parameter("lm_head.weight"), shard=shard)


OPT = FamilyParts(config=_config, embedding=_embedding, layer=_layer, head=_head)
