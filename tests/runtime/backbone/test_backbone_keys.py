"""Every value of a configuration's keys that is accepted is executed as transformers' own model does."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from muxtune.model import spec_from_hf
from muxtune.model.config_keys import ACTIVATIONS
from muxtune.model.families import FAMILIES, ROPE
from runtime.backbone.stage import Stage
from runtime.backbone.weights import open_weights
from runtime.data.batch import build_microbatch
from tests.muxtune.model.folders import GPT2, LLAMA, OPT, write_config
from tests.runtime.worlds import lay_out, make_task, make_tenant, solo_losses

LLAMA3 = {"rope_type": "llama3", "rope_theta": 50.0, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}

# Values that would be seen: an eps of 1e-5 or a theta of 10,000 could be left out without a trace.
CASES = [
    (LLAMA, {"num_key_value_heads": 4}),
    (LLAMA, {"num_key_value_heads": 1}),
    (LLAMA, {"head_dim": 6}),
    (LLAMA, {"rms_norm_eps": 0.5}),
    (LLAMA, {"attention_bias": True}),
    (LLAMA, {"mlp_bias": True}),
    (LLAMA, {"tie_word_embeddings": True}),
    (LLAMA, {"rope_theta": 3.0}),
    (LLAMA, {"rope_parameters": {"rope_type": "default", "rope_theta": 3.0}}),
    (LLAMA, {"rope_parameters": {"rope_type": "linear", "rope_theta": 50.0, "factor": 4.0}}),
    (LLAMA, {"rope_parameters": LLAMA3}),
    (LLAMA, {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 50.0}),
    (LLAMA, {"rope_scaling": LLAMA3 | {"partial_rotary_factor": 1.0}}),
    (LLAMA, {"attention_dropout": 0.5, "pretraining_tp": 2, "initializer_range": 0.5}),
    (GPT2, {"n_inner": 40}),
    (GPT2, {"layer_norm_epsilon": 0.5}),
    (GPT2, {"tie_word_embeddings": False}),
    (GPT2, {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5, "n_ctx": 8}),
    (OPT, {"enable_bias": False}),
    (OPT, {"tie_word_embeddings": False}),
    (OPT, {"word_embed_proj_dim": 16}),
    (OPT, {"dropout": 0.5, "attention_dropout": 0.5, "layerdrop": 0.5, "pad_token_id": 5}),
]
SHAPES = {
    "llama": {"rope_parameters", "hidden_act", "partial_rotary_factor"},
    "gpt2": {"hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"},
    "opt": set(),
}
"""Keys that are tried under another name, or in a case of their own."""


def _loss_of_both(folder, content) -> tuple[float, float]:
    """Ours and transformers', of the same sequence, in float64."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(write_config(folder, content)))
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases, too
            parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)
    write_config(folder, json.loads((folder / "config.json").read_text()) | content)
    spec = spec_from_hf(folder, "float64")
    tenant = make_tenant(spec, make_task("a"), [40, 7], folder / "a")
    stage = Stage(spec, range(spec.layers), first=True, last=True, weights=open_weights(spec))
    zero = {key: torch.zeros_like(value) for key, value in tenant.adapter.items()}
    stage.add_task(tenant.task, zero)
    batch = build_microbatch(lay_out([tenant], "pack"), [tenant.examples], task_ids=["a"])
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    return stage.forward(batch, None).item(), solo_losses(theirs, tenant.examples).item()


@pytest.mark.parametrize(("content", "change"), CASES, ids=str)
def test_it_is_executed_as_transformers_does(content, change, tmp_path):
    ours, theirs = _loss_of_both(tmp_path, content | change)
    assert ours == pytest.approx(theirs, rel=1e-9)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_each_activation_is_executed_as_transformers_does(activation, tmp_path):
    ours, theirs = _loss_of_both(tmp_path, OPT | {"activation_function": activation})
    assert ours == pytest.approx(theirs, rel=1e-9)


@pytest.mark.parametrize("activation", ["gelu", "gelu_pytorch_tanh", "relu", "relu2", "swish"])
def test_gated_activations_are_executed_as_transformers_does(activation, tmp_path):
    ours, theirs = _loss_of_both(tmp_path, LLAMA | {"hidden_act": activation})
    assert ours == pytest.approx(theirs, rel=1e-9)


def test_every_executed_key_and_every_rotary_type_is_in_a_case():
    for base in (LLAMA, GPT2, OPT):
        family = base["model_type"]
        tried = {key for content, change in CASES if content is base for key in change}
        assert (
            FAMILIES[family].executed_keys - tried - base.keys() - SHAPES[family]
            == {
                "llama": set(),
                "gpt2": {"activation_function"},
                "opt": {"activation_function"},
            }[family]
        )
    ropes = [
        change[key]
        for _, change in CASES
        for key in change
        if key.startswith("rope_") and key != "rope_theta"
    ]
    assert {rope.get("rope_type", rope.get("type")) for rope in ropes} == ROPE.keys()
