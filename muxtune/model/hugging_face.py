"""A backbone from the configuration of a Hugging Face directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from muxtune.model.config_keys import check_aliases, check_known, check_not_foreign, check_values
from muxtune.model.families import FAMILIES, Fields
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
    where, family = folder / "config.json", FAMILIES[config.model_type]
    loaded = config.to_dict()
    check_aliases(raw, config.attribute_map, where)
    check_values(loaded, family, where)
    try:
        spec = ModelSpec(
            name=folder.name,
            family=family.name,
            source=str(folder),
            tied_embeddings=config.tie_word_embeddings,
            dtype=dtype,
            **family.shapes(loaded, where),
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
        gguf = " (docs/backbones.md: how a GGUF file becomes one)" if any(folder.glob("*.gguf")) else ""
        raise SpecError("model", str(folder), f"a directory with config.json{gguf}")
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
        if raw["model_type"] in FAMILIES:
            check_known(raw, FAMILIES[raw["model_type"]], where)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except SpecError:
        raise
    except (*_UNREADABLE, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise SpecError(str(where), "unreadable", f"a Hugging Face configuration ({reason})") from error
    if config.model_type not in FAMILIES:
        *others, last = FAMILIES
        raise SpecError(f"{where}: model_type", config.model_type, f"{', '.join(others)} or {last}")
    return raw, config


_UNREADABLE = (ValueError, OSError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)
"""What transformers raises where a configuration makes no sense."""

_QUANTIZED_BY_FILE = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
"""Where tools for quantization (AutoGPTQ, AutoAWQ, ModelOpt) left what others keep in ``config.json``."""
