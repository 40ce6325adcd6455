"""Small Hugging Face directories with weights, made without torch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from muxtune.model.parameters import HEAD, parameter_shapes
from muxtune.model.spec import ModelSpec

LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 32,
    "max_position_embeddings": 64,
}
GPT2 = {
    "model_type": "gpt2",
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 4,
    "vocab_size": 32,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OPT = {
    "model_type": "opt",
    "hidden_size": 16,
    "ffn_dim": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 32,
    "max_position_embeddings": 64,
}
CONFIGS = {config["model_type"]: config for config in (LLAMA, GPT2, OPT)}


def write_config(folder: Path, content: dict[str, object]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def tensors_of(spec: ModelSpec) -> dict[str, np.ndarray]:
    """Random weights under transformers' names; a tied head is left out, as transformers does."""
    draw = np.random.default_rng(0)
    return {
        name: draw.standard_normal(shape).astype(np.float32)
        for name, shape in parameter_shapes(spec).items()
        if not (spec.tied_embeddings and name == HEAD)
    }


def write_weights(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def split_weights(
    folder: Path, tensors: dict[str, np.ndarray], names=("a.safetensors", "b.safetensors")
) -> None:
    """Two files and their index; names may lead anywhere."""
    keys = sorted(tensors)
    places = {}
    for name, own in zip(names, (keys[::2], keys[1::2]), strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        save_file({key: tensors[key] for key in own}, folder / name, metadata={"format": "pt"})
        places |= dict.fromkeys(own, str(name))
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
