"""Backbones as transformers builds them, on tensors without content."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, OPTConfig, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from muxtune.model import ModelSpec


def hf_config(spec: ModelSpec) -> PreTrainedConfig:
    """The configuration of a preset, written down here a second time."""
    if spec.family == "llama":
        return LlamaConfig(
            hidden_size=spec.hidden,
            intermediate_size=spec.ffn,
            num_hidden_layers=spec.layers,
            num_attention_heads=spec.heads,
            num_key_value_heads=spec.kv_heads,
            vocab_size=spec.vocab,
            tie_word_embeddings=False,
        )
    if spec.family == "opt":
        return OPTConfig(
            hidden_size=spec.hidden,
            ffn_dim=spec.ffn,
            num_hidden_layers=spec.layers,
            num_attention_heads=spec.heads,
            vocab_size=spec.vocab,
            max_position_embeddings=spec.max_positions,
        )
    return GPT2Config(
        n_embd=spec.hidden,
        n_layer=spec.layers,
        n_head=spec.heads,
        vocab_size=spec.vocab,
        n_positions=spec.max_positions,
        bos_token_id=0,
        eos_token_id=0,
    )


def hf_model(config: PreTrainedConfig) -> nn.Module:
    """A model without weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def numel(module: nn.Module) -> int:
    """Parameters of a module; one that stands in two places counts once."""
    return sum(parameter.numel() for parameter in module.parameters())


def hf_linears(layer: nn.Module):
    """Name, inputs and outputs of every linear of a layer; Conv1D keeps its weight transposed."""
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear):
            yield name, module.in_features, module.out_features
        elif isinstance(module, Conv1D):
            yield name, *module.weight.shape


def assert_same_shapes(spec: ModelSpec, model: nn.Module) -> None:
    """Layers, linears and parameters are the model's."""
    layers = model.get_submodule(spec.layer_prefix)
    assert len(layers) == spec.layers
    assert sorted((x.name, x.in_features, x.out_features) for x in spec.linears) == sorted(
        hf_linears(layers[0])
    )
    assert spec.layer_parameters == numel(layers[0])
    assert spec.parameters == numel(model)
    before, norm = {
        "llama": (("model.embed_tokens",), "model.norm"),
        "gpt2": (("transformer.wte", "transformer.wpe"), "transformer.ln_f"),
        "opt": (
            ("model.decoder.embed_tokens", "model.decoder.embed_positions"),
            "model.decoder.final_layer_norm",
        ),
    }[spec.family]
    assert spec.embedding_parameters == sum(numel(model.get_submodule(path)) for path in before)
    assert spec.head_parameters == numel(model.get_submodule(norm)) + numel(model.lm_head)
