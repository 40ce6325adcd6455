"""Backbones: shapes and counts are those of transformers' own models, targets those of PEFT."""

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig
from transformers.pytorch_utils import Conv1D

from muxtune.errors import SpecError, UserError
from muxtune.model import PRESETS, load_model_spec, spec_from_hf

ROPE_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "max_position_embeddings": 128,
}
GPT2 = {
    "model_type": "gpt2",
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "vocab_size": 64,
    "n_positions": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# One folder per test is enough: every example writes its own configuration over the last one.
IN_ONE_FOLDER = [HealthCheck.function_scoped_fixture]


def hf_model(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def hf_config(spec):
    """The configuration of a preset, written down here a second time."""
    if spec.family == "llama":
        return LlamaConfig(
            hidden_size=spec.hidden,
            intermediate_size=spec.ffn,
            num_hidden_layers=spec.layers,
            num_attention_heads=spec.heads,
            num_key_value_heads=spec.kv_heads,
            head_dim=spec.head_dim,
            vocab_size=spec.vocab,
            tie_word_embeddings=spec.tied_embeddings,
        )
    return GPT2Config(
        n_embd=spec.hidden,
        n_inner=spec.ffn,
        n_layer=spec.layers,
        n_head=spec.heads,
        vocab_size=spec.vocab,
        n_positions=spec.max_positions,
        bos_token_id=256,
        eos_token_id=257,
    )


def numel(module):
    """Parameters of a module; one that stands in two places counts once."""
    return sum(parameter.numel() for parameter in module.parameters())


def hf_linears(layer):
    """Name, inputs and outputs of every linear of a layer; Conv1D keeps its weight transposed."""
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear):
            yield name, module.in_features, module.out_features
        elif isinstance(module, Conv1D):
            yield name, *module.weight.shape


def assert_same_shapes(spec, model):
    layers = model.get_submodule(spec.layer_prefix)
    assert len(layers) == spec.layers
    assert sorted((x.name, x.in_features, x.out_features) for x in spec.linears) == sorted(
        hf_linears(layers[0])
    )
    assert spec.layer_parameters == numel(layers[0])
    assert spec.parameters == numel(model)
    backbone = model.model if spec.family == "llama" else model.transformer
    norm = backbone.norm if spec.family == "llama" else backbone.ln_f
    before = [backbone.embed_tokens] if spec.family == "llama" else [backbone.wte, backbone.wpe]
    assert spec.embedding_parameters == sum(map(numel, before))
    assert spec.head_parameters == numel(norm) + numel(model.lm_head)


@st.composite
def llama_configs(draw):
    kv_heads = draw(st.integers(1, 3))
    heads = kv_heads * draw(st.integers(1, 3))
    own_head_dim = draw(st.none() | st.sampled_from([2, 8, 16]))
    return LlamaConfig(
        hidden_size=heads * 4,
        intermediate_size=draw(st.integers(1, 40)),
        num_hidden_layers=draw(st.integers(1, 3)),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=own_head_dim,
        vocab_size=draw(st.integers(8, 40)),
        max_position_embeddings=draw(st.integers(8, 99)),
        attention_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
        tie_word_embeddings=draw(st.booleans()),
        rms_norm_eps=draw(st.sampled_from([1e-5, 1e-6])),
        rope_parameters={"rope_type": "default", "rope_theta": draw(st.sampled_from([10_000.0, 500_000.0]))},
    )


@st.composite
def gpt2_configs(draw):
    heads = draw(st.integers(1, 4))
    return GPT2Config(
        n_embd=heads * draw(st.sampled_from([2, 4, 8])),
        n_inner=draw(st.none() | st.integers(1, 40)),
        n_layer=draw(st.integers(1, 3)),
        n_head=heads,
        vocab_size=draw(st.integers(8, 40)),
        n_positions=draw(st.integers(8, 99)),
        tie_word_embeddings=draw(st.booleans()),
        bos_token_id=1,
        eos_token_id=2,
    )


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_shapes_of_transformers_models(name):
    spec = load_model_spec(name)
    assert_same_shapes(spec, hf_model(hf_config(spec)))


@given(config=llama_configs())
@settings(max_examples=25, deadline=None, suppress_health_check=IN_ONE_FOLDER)
def test_a_llama_directory_has_the_shapes_of_its_model(tmp_path, config):
    config.save_pretrained(tmp_path)
    spec = spec_from_hf(tmp_path)
    assert_same_shapes(spec, hf_model(config))
    assert (spec.heads, spec.kv_heads) == (config.num_attention_heads, config.num_key_value_heads)
    assert (spec.max_positions, spec.norm_eps) == (config.max_position_embeddings, config.rms_norm_eps)
    assert spec.rope_theta == config.rope_parameters["rope_theta"]
    assert spec.gated


@given(config=gpt2_configs())
@settings(max_examples=25, deadline=None, suppress_health_check=IN_ONE_FOLDER)
def test_a_gpt2_directory_has_the_shapes_of_its_model(tmp_path, config):
    config.save_pretrained(tmp_path)
    spec = spec_from_hf(tmp_path)
    assert_same_shapes(spec, hf_model(config))
    assert (spec.max_positions, spec.activation) == (config.n_positions, config.activation_function)
    assert not spec.gated


@pytest.mark.parametrize("content", [LLAMA, GPT2], ids=lambda c: c["model_type"])
def test_a_directory_written_with_its_weights_is_read(tmp_path, content):
    folder = tmp_path / "backbone"
    config_class = {"llama": LlamaConfig, "gpt2": GPT2Config}[content["model_type"]]
    model = AutoModelForCausalLM.from_config(config_class.from_dict(content))
    model.save_pretrained(folder)
    spec = load_model_spec(str(folder), "float64")
    assert (spec.name, spec.source) == ("backbone", str(folder.resolve()))
    assert (spec.dtype, spec.dtype_bytes) == ("float64", 8)
    assert_same_shapes(spec, model)


def write_config(folder, content):
    (folder / "config.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_parameters": {**ROPE_LLAMA3, "rope_theta": 5e5}},
        {"rope_scaling": ROPE_LLAMA3, "rope_theta": 5e5},  # as published before transformers 5
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 5e5},
        {"rope_theta": 5e5},
    ],
    ids=["llama3", "old llama3", "old linear", "default"],
)
def test_rotary_tables_that_do_not_change_with_the_length_are_accepted(tmp_path, rope):
    assert spec_from_hf(write_config(tmp_path, LLAMA | rope)).rope_theta == 5e5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "rope_type = 'dynamic': expected default, linear",
        ),
        (
            LLAMA | {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
            "rope_parameters.rope_type = 'yarn'",
        ),
        (GPT2 | {"scale_attn_weights": False}, "scale_attn_weights = False: expected True"),
        (
            GPT2 | {"scale_attn_by_inverse_layer_idx": True},
            "scale_attn_by_inverse_layer_idx = True: expected False",
        ),
        (GPT2 | {"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn = True: expected False"),
        (GPT2 | {"add_cross_attention": True}, "add_cross_attention = True: expected False"),
        ({"model_type": "opt"}, "model_type = 'opt': expected llama or gpt2"),
        ({"model_type": "no-such-model"}, "expected a Hugging Face configuration"),
        ({}, "expected a Hugging Face configuration"),
        ('{"model_type": "llama"', "expected a Hugging Face configuration"),
        (LLAMA | {"hidden_size": "wide"}, "expected a Hugging Face configuration"),
        (LLAMA | {"hidden_size": 30}, "expected a Hugging Face configuration"),
        (LLAMA | {"num_hidden_layers": 0}, "layers = 0: expected greater than 0"),
    ],
)
def test_what_we_do_not_execute_exactly_is_refused_in_one_line(tmp_path, content, message):
    with pytest.raises(SpecError) as caught:
        spec_from_hf(write_config(tmp_path, content))
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path}/config.json")
    assert "\n" not in str(caught.value)


def test_a_directory_without_configuration_is_refused(tmp_path):
    with pytest.raises(SpecError, match=r"model = .*: expected a directory with config\.json"):
        load_model_spec(str(tmp_path))


def test_an_unknown_name_is_refused_with_the_nearest_preset():
    with pytest.raises(
        UserError, match=r"no model preset or directory named 'lama-tiny'; did you mean 'llama-tiny'\?"
    ):
        load_model_spec("lama-tiny")


TARGETS = {
    "llama-tiny": [
        ["q_proj"],
        ["q_proj", "v_proj"],
        ["down_proj", "q_proj"],
        ["self_attn.o_proj"],
        ["mlp.up_proj", "k_proj", "k_proj"],
        ["proj"],
        ["self_attn"],
        ["_proj"],
        [""],
        ["q_proj "],
        ["Q_PROJ"],
        "all-linear",
    ],
    "gpt2-tiny": [
        ["c_attn"],
        ["c_proj"],
        ["attn.c_proj"],
        ["mlp.c_proj", "c_attn"],
        ["c_fc"],
        ["n.c_proj"],
        "all-linear",
    ],
}


@pytest.mark.parametrize(
    ("name", "targets"),
    [(name, targets) for name, all_targets in TARGETS.items() for targets in all_targets],
    ids=str,
)
def test_targets_match_what_peft_matches(name, targets):
    spec = load_model_spec(name)
    ours = ("all-linear",) if targets == "all-linear" else tuple(targets)
    config = LoraConfig(
        r=2, target_modules=targets, task_type="CAUSAL_LM", fan_in_fan_out=spec.family == "gpt2"
    )
    try:
        model = get_peft_model(hf_model(hf_config(spec)), config)
    except ValueError:  # PEFT: nothing matches, or something that is no linear
        with pytest.raises(SpecError, match=r"tasks\.t\.peft\.targets = .*: expected a linear of"):
            spec.targeted_linears(ours, "tasks.t.peft.targets")
        return
    adapted = {
        name.removeprefix(f"base_model.model.{spec.layer_prefix}.").removesuffix(".lora_A.default")
        for name, _ in model.named_modules()
        if name.endswith(".lora_A.default")
    }
    expected = {f"{layer}.{x.name}" for layer in range(spec.layers) for x in spec.targeted_linears(ours, "t")}
    assert adapted == expected


def test_targeted_linears_stand_in_the_order_of_execution_whatever_the_order_of_targets():
    spec = load_model_spec("llama-tiny")
    names = [x.name for x in spec.targeted_linears(("down_proj", "v_proj", "q_proj"), "t")]
    assert names == ["self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"]


@pytest.mark.parametrize("targets", [("q_proj", "nope"), ("all-linear", "q_proj"), ("c_attn",)])
def test_one_target_without_a_match_is_refused_even_beside_others(targets):
    with pytest.raises(SpecError) as caught:
        load_model_spec("llama-tiny").targeted_linears(targets, "tasks.t.peft.targets")
    wrong = next(t for t in targets if t != "q_proj")
    assert str(caught.value) == (
        f"tasks.t.peft.targets = {wrong!r}: expected a linear of llama-tiny: q_proj, k_proj, v_proj, o_proj, "
        "gate_proj, up_proj, down_proj, or all-linear alone"
    )


def test_dtype_is_that_of_weights_and_activations():
    assert [load_model_spec("llama-tiny", d).dtype_bytes for d in ("float32", "float64", "bfloat16")] == [
        4,
        8,
        2,
    ]
    assert load_model_spec("llama-tiny").dtype == "float32"
