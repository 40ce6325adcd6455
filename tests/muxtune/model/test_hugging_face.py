"""A Hugging Face directory is read as transformers reads it, and what is not executed exactly is refused."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, OPTConfig

from muxtune.model import load_model_spec, spec_from_hf
from muxtune.support.errors import SpecError
from tests.muxtune.model.configs import assert_same_shapes, hf_model
from tests.sampling import examples

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
OPT = {
    "model_type": "opt",
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "max_position_embeddings": 128,
}
# One folder per test is enough: every example writes its own configuration over the last one.
IN_ONE_FOLDER = [HealthCheck.function_scoped_fixture]


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


@st.composite
def opt_configs(draw):
    heads = draw(st.integers(1, 4))
    hidden = heads * draw(st.sampled_from([2, 4, 8]))
    return OPTConfig(
        hidden_size=hidden,
        ffn_dim=draw(st.integers(1, 40)),
        num_hidden_layers=draw(st.integers(1, 3)),
        num_attention_heads=heads,
        word_embed_proj_dim=draw(st.sampled_from([None, hidden])),
        vocab_size=draw(st.integers(8, 40)),
        max_position_embeddings=draw(st.integers(8, 99)),
        activation_function=draw(st.sampled_from(["relu", "gelu"])),
        enable_bias=draw(st.booleans()),
        tie_word_embeddings=draw(st.booleans()),
    )


@given(config=llama_configs())
@settings(max_examples=examples(25), suppress_health_check=IN_ONE_FOLDER)
def test_a_llama_directory_has_the_shapes_of_its_model(tmp_path, config):
    config.save_pretrained(tmp_path)
    spec = spec_from_hf(tmp_path)
    assert_same_shapes(spec, hf_model(config))
    assert (spec.heads, spec.kv_heads) == (config.num_attention_heads, config.num_key_value_heads)
    assert (spec.max_positions, spec.norm_eps) == (config.max_position_embeddings, config.rms_norm_eps)
    assert spec.rope_theta == config.rope_parameters["rope_theta"]
    assert spec.gated


@given(config=gpt2_configs())
@settings(max_examples=examples(25), suppress_health_check=IN_ONE_FOLDER)
def test_a_gpt2_directory_has_the_shapes_of_its_model(tmp_path, config):
    config.save_pretrained(tmp_path)
    spec = spec_from_hf(tmp_path)
    assert_same_shapes(spec, hf_model(config))
    assert (spec.max_positions, spec.activation) == (config.n_positions, config.activation_function)
    assert not spec.gated


@given(config=opt_configs())
@settings(max_examples=examples(25), suppress_health_check=IN_ONE_FOLDER)
def test_an_opt_directory_has_the_shapes_of_its_model(tmp_path, config):
    config.save_pretrained(tmp_path)
    spec = spec_from_hf(tmp_path)
    model = hf_model(config)
    assert_same_shapes(spec, model)
    assert spec.heads == spec.kv_heads == config.num_attention_heads
    assert (spec.max_positions, spec.activation) == (
        config.max_position_embeddings,
        config.activation_function,
    )
    assert spec.position_offset == model.model.decoder.embed_positions.offset
    assert spec.norm_eps == model.model.decoder.final_layer_norm.eps
    assert not spec.gated


@pytest.mark.parametrize("content", [LLAMA, GPT2, OPT], ids=lambda c: c["model_type"])
def test_a_directory_written_with_its_weights_is_read(tmp_path, content):
    folder = tmp_path / "backbone"
    config_class = {"llama": LlamaConfig, "gpt2": GPT2Config, "opt": OPTConfig}[content["model_type"]]
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
        (GPT2 | {"n_embd": 30}, "n_head = 4: expected a divisor of n_embd, 30"),
        (OPT | {"do_layer_norm_before": False}, "do_layer_norm_before = False: expected True"),
        (
            OPT | {"word_embed_proj_dim": 16},
            "word_embed_proj_dim = 16: expected 32, the hidden_size: embeddings that need no projection",
        ),
        (OPT | {"_remove_final_layer_norm": True}, "_remove_final_layer_norm = True: expected False"),
        (OPT | {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine = False"),
        (OPT | {"hidden_size": 30}, "num_attention_heads = 4: expected a divisor of hidden_size, 30"),
        ({"model_type": "gpt_neox"}, "model_type = 'gpt_neox': expected llama, gpt2 or opt"),
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
