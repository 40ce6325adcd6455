"""Every key of a configuration is executed, held to the value that is, known to be harmless, or refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from transformers import GPT2Config, LlamaConfig, OPTConfig
from transformers.activations import ACT2FN

from muxtune.model import spec_from_hf
from muxtune.model.config_keys import ACTIVATIONS, HARMLESS
from muxtune.model.families import FAMILIES, ROPE
from muxtune.support.errors import SpecError
from tests.muxtune.model.folders import CONFIGS, GPT2, LLAMA, OPT, write_config

CLASSES = {"llama": LlamaConfig, "gpt2": GPT2Config, "opt": OPTConfig}
SHARED = Path(__file__).parents[4] / "shared" / "cases"
ROOT = Path(__file__).parents[3]

ROPE_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@pytest.mark.parametrize("family", CLASSES)
def test_every_key_that_transformers_writes_is_in_one_table(family):
    """A new version of transformers with a new key fails here, until somebody has looked at what it does."""
    written = CLASSES[family]().to_dict().keys() | CLASSES[family].attribute_map.keys()
    tables = [FAMILIES[family].executed_keys, FAMILIES[family].fixed_keys.keys(), HARMLESS]
    assert written <= frozenset().union(*tables)
    for i, one in enumerate(tables):
        assert not any(one & other for other in tables[i + 1 :])


@pytest.mark.parametrize("family", CLASSES)
def test_what_transformers_writes_itself_is_read(family, tmp_path):
    CLASSES[family](**{k: v for k, v in CONFIGS[family].items() if k != "model_type"}).save_pretrained(
        tmp_path
    )
    assert spec_from_hf(tmp_path) == spec_from_hf(write_config(tmp_path, CONFIGS[family]))


def test_activations_are_those_of_transformers_that_have_no_parameters():
    with_parameters = {name for name in ACT2FN if list(ACT2FN[name].parameters())}
    assert with_parameters == {"prelu", "xielu"}
    assert ACT2FN.keys() - with_parameters == ACTIVATIONS


OTHER_VALUES = [
    (LLAMA, "quantization_config", {"bits": 4, "quant_method": "gptq"}),
    (LLAMA, "quantization_config", {"bits": 4, "quant_method": "awq"}),
    (LLAMA, "quantization_config", {"load_in_4bit": True, "quant_method": "bitsandbytes"}),
    (LLAMA, "quantization_config", {"quant_method": "fp8"}),
    (OPT, "quantization_config", {"quant_method": "compressed-tensors", "format": "int-quantized"}),
    (GPT2, "quantization_config", {"anything": 1}),
    (LLAMA, "compression_config", {"format": "pack-quantized"}),
    (LLAMA, "quantization", {"group_size": 64, "bits": 4}),
    (LLAMA, "auto_map", {"AutoConfig": "configuration_mine.MineConfig"}),
    (GPT2, "auto_map", {"AutoModelForCausalLM": "modeling_mine.Mine"}),
    (LLAMA, "sliding_window", 16),
    (LLAMA, "use_sliding_window", True),
    (LLAMA, "layer_types", ["full_attention", "sliding_attention"]),
    (LLAMA, "rope_interleaved", True),
    (LLAMA, "logit_scale", 0.0625),
    (LLAMA, "logits_scaling", 8.0),
    (LLAMA, "final_logit_softcapping", 30.0),
    (LLAMA, "embedding_multiplier", 12.0),
    (LLAMA, "residual_multiplier", 0.22),
    (LLAMA, "attention_multiplier", 0.5),
    (LLAMA, "qk_norm", True),
    (LLAMA, "num_experts", 8),
    (LLAMA, "per_layer_config", {"0": {"num_key_value_heads": 1}}),
    (LLAMA, "pruned_heads", {"0": [1]}),
    (LLAMA, "configuration_files", ["config.4.0.0.json"]),
    (LLAMA, "is_encoder_decoder", True),
    (LLAMA, "hidden_act", "xielu"),
    (LLAMA, "hidden_act", "no-such-function"),
    (LLAMA, "num_key_value_heads", 3),
    (LLAMA, "num_key_value_heads", 0),
    (GPT2, "activation_function", "prelu"),
    (GPT2, "scale_attn_weights", False),
    (GPT2, "scale_attn_by_inverse_layer_idx", True),
    (GPT2, "reorder_and_upcast_attn", True),
    (GPT2, "add_cross_attention", True),
    (GPT2, "is_encoder_decoder", True),
    (GPT2, "embeddings_scale", 10.0),
    (GPT2, "intermediate_size", 99),
    (GPT2, "hidden_size", 32),
    (OPT, "do_layer_norm_before", False),
    (OPT, "_remove_final_layer_norm", True),
    (OPT, "layer_norm_elementwise_affine", False),
    (OPT, "word_embed_proj_dim", 8),
    (OPT, "is_encoder_decoder", True),
    (OPT, "scale_embeddings", True),
    (OPT, "activation_function", "xielu"),
]


@pytest.mark.parametrize(("content", "key", "value"), OTHER_VALUES, ids=lambda x: str(x)[:40])
def test_what_is_not_executed_is_refused_by_its_key(content, key, value, tmp_path):
    folder = write_config(tmp_path, content | {key: value})
    with pytest.raises(SpecError) as caught:
        spec_from_hf(folder)
    assert str(caught.value).startswith(f"{tmp_path}/config.json: {key} = {str(value)[:10]}") or (
        isinstance(value, str) and f"config.json: {key} = {value!r}" in str(caught.value)
    )
    assert "\n" not in str(caught.value)


def test_every_key_with_one_value_is_tried():
    """So that a key is not added to the table without its refusal being seen."""
    tried = {(content["model_type"], key) for content, key, _ in OTHER_VALUES}
    assert {(family, key) for family, each in FAMILIES.items() for key in each.fixed_keys} <= tried


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, r"rope_parameters\.rope_type = 'dynamic'"),
        ({"rope_type": "yarn", "factor": 2.0}, r"rope_parameters\.rope_type = 'yarn'"),
        ({"rope_type": "proportional", "partial_rotary_factor": 0.5}, r"rope_parameters\.rope_type"),
        (ROPE_LLAMA3 | {"partial_rotary_factor": 0.5}, r"partial_rotary_factor = 0\.5: expected 1\.0"),
        ({"rope_type": "default", "factor": 8.0}, r"rope_parameters\.factor = 8\.0: .*rope_type default"),
        ({"rope_type": "linear", "factor": 2.0, "low_freq_factor": 1.0}, r"rope_parameters\.low_freq_factor"),
        ({"rope_type": "default", "mrope_section": [2, 2]}, r"rope_parameters\.mrope_section"),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["rope_parameters", "rope_scaling"])
def test_rotary_tables_and_parameters_that_are_not_read_are_refused(name, rope, message, tmp_path):
    folder = write_config(tmp_path, LLAMA | {name: rope, "rope_theta": 1e4})
    with pytest.raises(SpecError, match=message):
        spec_from_hf(folder)


def test_heads_that_are_rotated_in_part_are_refused(tmp_path):
    folder = write_config(tmp_path, LLAMA | {"partial_rotary_factor": 0.5})
    with pytest.raises(SpecError, match=r"rope_parameters\.partial_rotary_factor = 0\.5: expected 1\.0"):
        spec_from_hf(folder)


@pytest.mark.parametrize("kind", ROPE)
def test_rotary_tables_of_each_known_type_are_read_with_all_their_parameters(kind, tmp_path):
    known = ROPE[kind] | {"rope_theta", "rope_type", "original_max_position_embeddings"}
    rope = {key: value for key, value in ROPE_LLAMA3.items() if key in known} | {"rope_type": kind}
    assert spec_from_hf(write_config(tmp_path, LLAMA | {"rope_parameters": rope})).rope_theta == 1e4


@pytest.mark.parametrize(
    "extra",
    [
        {"quantization_config": None, "auto_map": {}, "sliding_window": None, "logit_scale": None},
        {"use_sliding_window": False, "rope_interleaved": False, "prefix": "</s>"},
        {"torch_dtype": "float16", "unsloth_version": "2025.1", "transformers.js_config": {"dtype": "q4"}},
        {"attention_dropout": 0.1, "pretraining_tp": 2, "use_cache": False, "pad_token_id": -1},
        {"temperature": 0.6, "max_length": 4096, "id2label": {"0": "a", "1": "b"}, "_name_or_path": "x"},
        {"_model_name_or_path": "Smollm2 135M", "unk_token_id": 0},  # as transformers saves a GGUF file
    ],
    ids=str,
)
def test_what_says_nothing_or_changes_nothing_is_accepted(extra, tmp_path):
    plain = spec_from_hf(write_config(tmp_path, LLAMA))
    assert spec_from_hf(write_config(tmp_path, LLAMA | extra)) == plain


@pytest.mark.parametrize("name", ["quantize_config.json", "quant_config.json", "hf_quant_config.json"])
def test_quantization_that_a_file_of_its_own_tells_of_is_refused(name, tmp_path):
    folder = write_config(tmp_path, LLAMA)
    (folder / name).write_text("{}")
    with pytest.raises(SpecError, match=f"a backbone that is not quantized, as {name} says it is"):
        spec_from_hf(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("torch_dtype", []),
        ("num_attention_heads", 0),
        ("num_hidden_layers", "9" * 5000),
        ("rope_parameters", [1]),
        ("rope_parameters", {"rope_type": ["default"]}),
        ("hidden_act", "silu\n\x1b[31m"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(key, value, tmp_path):
    with pytest.raises(SpecError) as caught:
        spec_from_hf(write_config(tmp_path, LLAMA | {key: value}))
    assert not {"\n", "\x1b"} & set(str(caught.value))


def test_a_configuration_without_model_type_is_not_guessed_from_its_path(tmp_path):
    content = {key: value for key, value in LLAMA.items() if key != "model_type"}
    with pytest.raises(SpecError, match="no model_type"):
        spec_from_hf(write_config(tmp_path / "my-llama", content))


def test_every_key_stands_in_the_documents_table():
    text = (ROOT / "docs" / "backbones.md").read_text()
    listed = set(re.findall(r"`([^`\s]+)`", text))
    families = FAMILIES.values()
    tables = [f.executed_keys | f.fixed_keys.keys() for f in families] + [HARMLESS, ROPE.keys()]
    assert set().union(*tables) <= listed


@pytest.mark.skipif(not SHARED.is_dir(), reason="no shared cases on this machine")
@pytest.mark.parametrize(
    ("case", "message"),
    [("quantized/gptq", "quantization_config = "), ("backbones/automap", "auto_map = ")],
)
def test_the_shared_cases_are_refused_by_their_key(case, message):
    with pytest.raises(SpecError, match=rf"config\.json: {message}.*: expected none"):
        spec_from_hf(SHARED / case)


def test_whoever_has_a_gguf_file_is_told_how_it_becomes_a_directory(tmp_path):
    with pytest.raises(SpecError, match=r"expected a directory with config\.json$"):
        spec_from_hf(tmp_path)
    (tmp_path / "smollm2-135m.gguf").touch()
    with pytest.raises(SpecError, match=r"a directory with config\.json \(.*how a GGUF file becomes one\)$"):
        spec_from_hf(tmp_path)
