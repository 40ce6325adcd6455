"""A backbone from the configuration of a Hugging Face directory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from muxtune.model.config_keys import (
    Fields,
    check_aliases,
    check_known,
    check_not_foreign,
    check_rope,
    check_values,
)
from muxtune.model.spec import Dtype, ModelSpec
from muxtune.model.stored import check_stored
from muxtune.support.errors import SpecError, spec_error_from


def spec_from_hf(folder: Path, dtype: Dtype = "float32") -> ModelSpec:
    """Read a LlamaForCausalLM, GPT2LMHeadModel or OPTForCausalLM directory.

    Its code is never run, and its weights are not read: only the names and shapes of its tensors are, where
    they are stored as safetensors.

    Raises:
        SpecError: ``config.json`` is missing or asks for something that we do not execute exactly, the
            weights are not those that it describes, or an adapter lies beside them.
    """
    folder = folder.resolve()
    if (folder / "adapter_config.json").is_file():
        expected = (
            "a backbone without adapter_config.json: transformers would attach it, muxtune would not "
            "(merge it or move its files away)"
        )
        raise SpecError("model", str(folder), expected)
    raw, config = read_config(folder)
    where, family = folder / "config.json", config.model_type
    loaded = config.to_dict()
    check_aliases(raw, config.attribute_map, where)
    check_values(loaded, family, where)
    try:
        spec = ModelSpec(
            name=folder.name,
            family=family,
            source=str(folder),
            tied_embeddings=config.tie_word_embeddings,
            dtype=dtype,
            **_FAMILIES[family](loaded, where),
        )
    except ValidationError as error:
        raise spec_error_from(error, str(where)) from error
    check_stored(spec)
    return spec


def read_config(folder: Path) -> tuple[Fields, Any]:
    """Content of ``config.json``, and what transformers makes of it without running anything of the folder.

    Raises:
        SpecError: The file is missing, is not a configuration of a known family, or needs the folder's code.
    """
    where = folder / "config.json"
    if not where.is_file():
        raise SpecError("model", str(folder), "a directory with config.json")
    for name in _QUANTIZED_BY_FILE:
        if (folder / name).is_file():
            raise SpecError("model", str(folder), f"a backbone that is not quantized, as {name} says it is")
    from huggingface_hub.errors import StrictDataclassError  # noqa: PLC0415  # seconds to import
    from transformers import AutoConfig  # noqa: PLC0415

    try:
        raw = json.loads(where.read_bytes())
        if not isinstance(raw, dict) or not isinstance(raw.get("model_type"), str):
            raise ValueError("no model_type")  # transformers would guess it from the path
        check_not_foreign(raw, where)
        if raw["model_type"] in _FAMILIES:
            check_known(raw, raw["model_type"], where)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except SpecError:
        raise
    except (*_UNREADABLE, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise SpecError(str(where), "unreadable", f"a Hugging Face configuration ({reason})") from error
    if config.model_type not in _FAMILIES:
        raise SpecError(f"{where}: model_type", config.model_type, "llama, gpt2 or opt")
    return raw, config


_UNREADABLE = (ValueError, OSError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)
"""What transformers raises where a configuration makes no sense."""

_QUANTIZED_BY_FILE = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
"""Where tools for quantization (AutoGPTQ, AutoAWQ, ModelOpt) left what others keep in ``config.json``."""


def _llama(c: Fields, where: Path) -> dict[str, Any]:
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


def _gpt2(c: Fields, where: Path) -> dict[str, Any]:
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


def _opt(c: Fields, where: Path) -> dict[str, Any]:
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


def _head_dim(c: Fields, width: str, heads: str, where: Path) -> int:
    if c[heads] < 1 or c[width] % c[heads]:
        raise SpecError(f"{where}: {heads}", c[heads], f"a divisor of {width}, {c[width]}")
    dim: int = c[width] // c[heads]
    return dim


_FAMILIES: dict[str, Callable[[Fields, Path], dict[str, Any]]] = {
    "llama": _llama,
    "gpt2": _gpt2,
    "opt": _opt,
}
"""Shapes from a configuration, by its ``model_type``."""
