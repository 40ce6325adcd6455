"""OPT: learned positions, layer norms, ReLU."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from muxtune.model.families.family import BackboneFamily, Fields, LinearShape, head_dim
from muxtune.support.errors import SpecError


def _shapes(c: Fields, where: Path) -> dict[str, Any]:
    if c["word_embed_proj_dim"] != c["hidden_size"]:
        expected = f"{c['hidden_size']}, the hidden_size: embeddings that need no projection"
        raise SpecError(f"{where}: word_embed_proj_dim", c["word_embed_proj_dim"], expected)
    return {
        "layers": c["num_hidden_layers"],
        "hidden": c["hidden_size"],
        "ffn": c["ffn_dim"],
        "heads": c["num_attention_heads"],
        "kv_heads": c["num_attention_heads"],
        "head_dim": head_dim(c, "hidden_size", "num_attention_heads", where),
        "vocab": c["vocab_size"],
        "max_positions": c["max_position_embeddings"],
        "activation": c["activation_function"],
        "norm_eps": 1e-5,  # torch's default; the configuration has no field for it
        "attention_bias": c["enable_bias"],
        "mlp_bias": c["enable_bias"],
    }


def _linears(hidden: int, ffn: int, q: int, kv: int) -> tuple[LinearShape, ...]:
    return (
        ("self_attn.q_proj", hidden, q, "attention"),
        ("self_attn.k_proj", hidden, kv, "attention"),
        ("self_attn.v_proj", hidden, kv, "attention"),
        ("self_attn.out_proj", q, hidden, "attended"),
        ("fc1", hidden, ffn, "mlp"),
        ("fc2", ffn, hidden, "inner"),
    )


OPT = BackboneFamily(
    name="opt",
    executed_keys=frozenset(
        "vocab_size hidden_size ffn_dim num_hidden_layers num_attention_heads max_position_embeddings "
        "word_embed_proj_dim activation_function enable_bias tie_word_embeddings".split()
    ),
    fixed_keys={
        "is_encoder_decoder": False,
        "do_layer_norm_before": True,
        "_remove_final_layer_norm": False,
        "layer_norm_elementwise_affine": True,
    },
    activation_key="activation_function",
    shapes=_shapes,
    preset={
        "activation": "relu",
        "attention_bias": True,
        "mlp_bias": True,
        "tied_embeddings": True,
    },
    layers="model.decoder.layers",
    linears=_linears,
    embedding="model.decoder.embed_tokens.weight",
    positions="model.decoder.embed_positions.weight",
    position_offset=2,  # nothing reads the two rows before it
    layer_norms=("self_attn_layer_norm", "final_layer_norm"),
    final_norm="model.decoder.final_layer_norm",
    other_layer_modules=("activation_fn",),
    derived_tensors=re.compile(r"(model\.)?decoder\.version"),
    bias_keys=("enable_bias", "enable_bias"),
)
