"""GPT-2 and GPT-3: learned positions, layer norms, queries, keys and values in one linear."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from muxtune.model.families.family import BackboneFamily, Fields, LinearShape, head_dim


def _shapes(c: Fields, where: Path) -> dict[str, Any]:
    return {
        "layers": c["n_layer"],
        "hidden": c["n_embd"],
        "ffn": c["n_inner"] or 4 * c["n_embd"],
        "heads": c["n_head"],
        "kv_heads": c["n_head"],
        "head_dim": head_dim(c, "n_embd", "n_head", where),
        "vocab": c["vocab_size"],
        "max_positions": c["n_positions"],
        "activation": c["activation_function"],
        "norm_eps": c["layer_norm_epsilon"],
        "attention_bias": True,
        "mlp_bias": True,
    }


def _linears(hidden: int, ffn: int, q: int, kv: int) -> tuple[LinearShape, ...]:
    return (
        ("attn.c_attn", hidden, q + 2 * kv, "attention"),
        ("attn.c_proj", q, hidden, "attended"),
        ("mlp.c_fc", hidden, ffn, "mlp"),
        ("mlp.c_proj", ffn, hidden, "inner"),
    )


GPT2 = BackboneFamily(
    name="gpt2",
    executed_keys=frozenset(
        "vocab_size n_embd hidden_size n_inner n_layer num_hidden_layers n_head num_attention_heads "
        "n_positions max_position_embeddings activation_function layer_norm_epsilon "
        "tie_word_embeddings".split()
    ),
    fixed_keys={
        "is_encoder_decoder": False,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "add_cross_attention": False,
    },
    activation_key="activation_function",
    shapes=_shapes,
    preset={
        "activation": "gelu_new",
        "attention_bias": True,
        "mlp_bias": True,
        "tied_embeddings": True,
    },
    transposed_weights=True,
    layers="transformer.h",
    linears=_linears,
    embedding="transformer.wte.weight",
    positions="transformer.wpe.weight",
    layer_norms=("ln_1", "ln_2"),
    final_norm="transformer.ln_f",
    other_modules=("transformer.drop",),
    other_layer_modules=("attn.attn_dropout", "attn.resid_dropout", "mlp.act", "mlp.dropout"),
    derived_tensors=re.compile(r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias"),  # causal masks
)
