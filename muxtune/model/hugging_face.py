"""A backbone from the configuration of a Hugging Face directory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from muxtune.errors import SpecError, spec_error_from
from muxtune.model.spec import Dtype, ModelSpec

_Fields = Mapping[str, Any]
"""Of a configuration."""


def spec_from_hf(folder: Path, dtype: Dtype = "float32") -> ModelSpec:
    """Read ``config.json`` of a LlamaForCausalLM, GPT2LMHeadModel or OPTForCausalLM directory.

    Raises:
        SpecError: The file is missing, or asks for something that we do not execute exactly.
    """
    where = folder / "config.json"
    if not where.is_file():
        raise SpecError("model", str(folder), "a directory with config.json")
    from huggingface_hub.errors import StrictDataclassError  # noqa: PLC0415  # seconds to import
    from transformers import AutoConfig  # noqa: PLC0415

    try:
        config = AutoConfig.from_pretrained(folder)
    except (ValueError, OSError, KeyError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise SpecError(str(where), "unreadable", f"a Hugging Face configuration ({reason})") from error
    if config.model_type not in _FAMILIES:
        raise SpecError(f"{where}: model_type", config.model_type, "llama, gpt2 or opt")
    try:
        shapes = _FAMILIES[config.model_type](config.to_dict(), where)
        return ModelSpec(
            name=folder.resolve().name,
            family=config.model_type,
            source=str(folder.resolve()),
            tied_embeddings=config.tie_word_embeddings,
            dtype=dtype,
            **shapes,
        )
    except ValidationError as error:
        raise spec_error_from(error, str(where)) from error


def _llama(c: _Fields, where: Path) -> dict[str, Any]:
    rope = c["rope_parameters"]
    if rope["rope_type"] not in {"default", "linear", "llama3"}:
        expected = "default, linear or llama3: tables that do not change with the length"
        raise SpecError(f"{where}: rope_parameters.rope_type", rope["rope_type"], expected)
    return {
        "layers": c["num_hidden_layers"],
        "hidden": c["hidden_size"],
        "ffn": c["intermediate_size"],
        "heads": c["num_attention_heads"],
        "kv_heads": c["num_key_value_heads"],
        "head_dim": c["head_dim"] or c["hidden_size"] // c["num_attention_heads"],
        "vocab": c["vocab_size"],
        "max_positions": c["max_position_embeddings"],
        "activation": c["hidden_act"],
        "norm_eps": c["rms_norm_eps"],
        "rope_theta": rope["rope_theta"],
        "attention_bias": c["attention_bias"],
        "mlp_bias": c["mlp_bias"],
    }


def _gpt2(c: _Fields, where: Path) -> dict[str, Any]:
    plain = {
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "add_cross_attention": False,
    }
    _refuse_others(c, plain, where)
    return {
        "layers": c["n_layer"],
        "hidden": c["n_embd"],
        "ffn": c["n_inner"] or 4 * c["n_embd"],
        "heads": c["n_head"],
        "kv_heads": c["n_head"],
        "head_dim": _head_dim(c, "n_embd", "n_head", where),
        "vocab": c["vocab_size"],
        "max_positions": c["n_positions"],
        "activation": c["activation_function"],
        "norm_eps": c["layer_norm_epsilon"],
        "attention_bias": True,
        "mlp_bias": True,
    }


def _opt(c: _Fields, where: Path) -> dict[str, Any]:
    plain = {
        "do_layer_norm_before": True,
        "_remove_final_layer_norm": False,
        "layer_norm_elementwise_affine": True,
    }
    _refuse_others(c, plain, where)
    if c["word_embed_proj_dim"] != c["hidden_size"]:
        expected = f"{c['hidden_size']}, the hidden_size: embeddings that need no projection"
        raise SpecError(f"{where}: word_embed_proj_dim", c["word_embed_proj_dim"], expected)
    return {
        "layers": c["num_hidden_layers"],
        "hidden": c["hidden_size"],
        "ffn": c["ffn_dim"],
        "heads": c["num_attention_heads"],
        "kv_heads": c["num_attention_heads"],
        "head_dim": _head_dim(c, "hidden_size", "num_attention_heads", where),
        "vocab": c["vocab_size"],
        "max_positions": c["max_position_embeddings"],
        "activation": c["activation_function"],
        "norm_eps": 1e-5,  # torch's default; the configuration has no field for it
        "attention_bias": c["enable_bias"],
        "mlp_bias": c["enable_bias"],
    }


def _refuse_others(c: _Fields, plain: Mapping[str, object], where: Path) -> None:
    """Refuse a configuration in which one of these fields has another value than the one we execute."""
    for field, expected in plain.items():
        if c[field] != expected:
            raise SpecError(f"{where}: {field}", c[field], str(expected))


def _head_dim(c: _Fields, width: str, heads: str, where: Path) -> int:
    if c[width] % c[heads]:
        raise SpecError(f"{where}: {heads}", c[heads], f"a divisor of {width}, {c[width]}")
    dim: int = c[width] // c[heads]
    return dim


_FAMILIES: dict[str, Callable[[_Fields, Path], dict[str, Any]]] = {
    "llama": _llama,
    "gpt2": _gpt2,
    "opt": _opt,
}
"""Shapes from a configuration, by its ``model_type``."""
