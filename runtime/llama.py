"""Takes the parts of a LlamaForCausalLM."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from muxtune.alignment import row_slots
from muxtune.model import ModelSpec
from runtime.attention import RopeTables
from runtime.elementwise import RmsNorm, find_gated_activation
from runtime.layers import DecoderLayer, Embedding, Head
from runtime.lora import SharedLinear

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


def llama_rope(spec: ModelSpec, weights: LlamaForCausalLM, device: str) -> RopeTables:
    """Cosines and sines of all slots of a row, from transformers' module: scaled, in float32, then cast."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding  # noqa: PLC0415  # seconds

    rotary = LlamaRotaryEmbedding(weights.config)
    like = torch.empty(0, dtype=getattr(torch, spec.dtype))
    cos, sin = rotary(like, torch.arange(row_slots(spec.max_positions))[None])
    return RopeTables.build(cos[0].to(device), sin[0].to(device))


def llama_embedding(weights: LlamaForCausalLM) -> Embedding:
    """Token embedding."""
    return Embedding(weights.model.embed_tokens.weight)


def llama_layer(spec: ModelSpec, weights: LlamaForCausalLM, layer: int, rope: RopeTables) -> DecoderLayer:
    """Copy of one layer."""
    source = weights.model.layers[layer]
    attention, mlp = source.self_attn, source.mlp
    return DecoderLayer(
        attention_norm=RmsNorm(source.input_layernorm.weight, spec.norm_eps),
        qkv=_shared(attention, "self_attn", ("q_proj", "k_proj", "v_proj")),
        attention_out=_shared(attention, "self_attn", ("o_proj",)),
        mlp_norm=RmsNorm(source.post_attention_layernorm.weight, spec.norm_eps),
        mlp_in=_shared(mlp, "mlp", ("gate_proj", "up_proj")),
        mlp_out=_shared(mlp, "mlp", ("down_proj",)),
        activation=find_gated_activation(spec.activation),
        heads=spec.heads,
        kv_heads=spec.kv_heads,
        rope=rope,
    )


def llama_head(spec: ModelSpec, weights: LlamaForCausalLM) -> Head:
    """Final norm and head; its own copy where the embeddings are tied."""
    return Head(RmsNorm(weights.model.norm.weight, spec.norm_eps), weights.lm_head.weight)


def _shared(block: Any, path: str, names: tuple[str, ...]) -> SharedLinear:  # noqa: ANN401  # untyped library
    linears = {name: getattr(block, name) for name in names}
    return SharedLinear(
        {f"{path}.{name}": linear.weight.detach() for name, linear in linears.items()},
        [linear.bias.detach() for linear in linears.values() if linear.bias is not None],
    )
