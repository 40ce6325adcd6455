"""Llama: rotary positions, RMS norms, a gated MLP, and perhaps fewer heads for keys and values."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from muxtune.model.families.family import BackboneFamily, Fields, LinearShape
from muxtune.model.families.rope import check_rope
from muxtune.support.errors import SpecError


def _shapes(c: Fields, where: Path) -> dict[str, Any]:
    rope = c["rope_parameters"]
    check_rope(rope, where)
    heads, kv_heads = c["num_attention_heads"], c["num_key_value_heads"]
    if kv_heads < 1 or heads % kv_heads:
        expected = f"a divisor of num_attention_heads, {heads}"
        raise SpecError(f"{where}: num_key_value_heads", kv_heads, expected)
    return {
        "layers": c["num_hidden_layers"],
        "hidden": c["hidden_size"],
        "ffn": c["intermediate_size"],
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": c["head_dim"] or c["hidden_size"] // heads,
        "vocab": c["vocab_size"],
        "max_positions": c["max_position_embeddings"],
        "activation": c["hidden_act"],
        "norm_eps": c["rms_norm_eps"],
        "rope_theta": rope["rope_theta"],
        "attention_bias": c["attention_bias"],
        "mlp_bias": c["mlp_bias"],
    }


def _linears(hidden: int, ffn: int, q: int, kv: int) -> tuple[LinearShape, ...]:
    return (
        ("self_attn.q_proj", hidden, q, "attention"),
        ("self_attn.k_proj", hidden, kv, "attention"),
        ("self_attn.v_proj", hidden, kv, "attention"),
        ("self_attn.o_proj", q, hidden, "attended"),
        ("mlp.gate_proj", hidden, ffn, "mlp"),
        ("mlp.up_proj", hidden, ffn, "mlp"),
        ("mlp.down_proj", ffn, hidden, "inner"),
    )


LLAMA = BackboneFamily(
    name="llama",
    executed_keys=frozenset(
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
        "head_dim max_position_embeddings hidden_act rms_norm_eps rope_parameters rope_scaling rope_theta "
        "partial_rotary_factor attention_bias mlp_bias tie_word_embeddings".split()
    ),
    fixed_keys={"is_encoder_decoder": False, "sliding_window": None},
    activation_key="hidden_act",
    shapes=_shapes,
    preset={"activation": "silu"},
    gated=True,
    rms_norm=True,
    layers="model.layers",
    linears=_linears,
    embedding="model.embed_tokens.weight",
    layer_norms=("input_layernorm", "post_attention_layernorm"),
    final_norm="model.norm",
    other_modules=("model.rotary_emb",),
    other_layer_modules=("mlp.act_fn",),
    derived_tensors=re.compile(r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"),  # frequencies
)
