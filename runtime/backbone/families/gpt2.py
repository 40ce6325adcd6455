"""Takes the parts of a GPT2LMHeadModel; its dropouts are off, a frozen backbone is deterministic."""

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
    from transformers import GPT2Config  # noqa: PLC0415  # seconds to import

    return GPT2Config(
        n_positions=spec.max_positions,
        n_embd=spec.hidden,
        n_layer=spec.layers,
        n_head=spec.heads,
        n_inner=spec.ffn,
        activation_function=spec.activation,
        layer_norm_epsilon=spec.norm_eps,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        **common,
    )


def _embedding(spec: ModelSpec, weights: Weights, shard: Shard) -> Embedding:
    del spec
    tokens_VD, positions_PD = (weights.get_parameter(f"transformer.{name}.weight") for name in ("wte", "wpe"))
    return Embedding(tokens_VD, positions_PD, shard=shard)


def _layer(
    spec: ModelSpec, weights: Weights, layer: int, rope: RopeTables | None, shard: Shard
) -> DecoderLayer:
    return DecoderLayer(
        attention_norm=layer_norm(spec, weights, f"transformer.h.{layer}.ln_1"),
        qkv=shared_linear(spec, weights, layer, "attn.c_attn", shard=shard),
        attention_out=shared_linear(spec, weights, layer, "attn.c_proj", shard=shard),
        mlp_norm=layer_norm(spec, weights, f"transformer.h.{layer}.ln_2"),
        mlp_in=shared_linear(spec, weights, layer, "mlp.c_fc", shard=shard),
        mlp_out=shared_linear(spec, weights, layer, "mlp.c_proj", shard=shard),
        spec=spec,
        rope=rope,
        shard=shard,
    )


def _head(spec: ModelSpec, weights: Weights, shard: Shard) -> Head:
    norm = layer_norm(spec, weights, "transformer.ln_f")
    return Head(norm, weights.get_parameter("lm_head.weight"), shard=shard)


GPT2 = FamilyParts(config=_config, embedding=_embedding, layer=_layer, head=_head)
