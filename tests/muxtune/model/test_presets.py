"""Presets are the published models: checked against transformers and against numbers from the papers."""

import pytest

from muxtune.model import BYTE_VOCAB, PRESETS, load_model_spec
from muxtune.support.errors import UserError
from runtime.backbone.hugging_face import hf_config as runtime_config
from tests.helpers import TINY_PRESETS
from tests.muxtune.model.configs import assert_same_shapes, hf_config, hf_model


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_shapes_of_transformers_models(name):
    spec = load_model_spec(name)
    assert_same_shapes(spec, hf_model(hf_config(spec)))


@pytest.mark.parametrize("name", PRESETS)
def test_the_runtime_builds_presets_with_these_shapes(name):
    spec = load_model_spec(name)
    assert_same_shapes(spec, hf_model(runtime_config(spec)))


@pytest.mark.parametrize(
    ("name", "layers", "parameters"),
    [
        ("gpt3-2.7b", 32, 2.65e9),
        ("llama2-7b", 32, 6_738_415_616),  # as the published weights
        ("llama2-13b", 40, 13_015_864_320),
        ("llama3-8b", 32, 8_030_261_248),
        ("opt-30b", 48, 29_974_540_288),
    ],
)
def test_published_models_have_the_published_size(name, layers, parameters):
    spec = PRESETS[name]
    assert spec.layers == layers
    assert spec.parameters == pytest.approx(parameters, rel=1e-3 if isinstance(parameters, float) else 0)
    assert spec.hidden == spec.heads * spec.head_dim


def test_the_published_grouped_queries_and_rotation_of_llama3():
    assert (PRESETS["llama3-8b"].kv_heads, PRESETS["llama3-8b"].rope_theta) == (8, 500_000)
    assert {PRESETS[name].kv_heads for name in ("llama2-7b", "gpt3-2.7b")} == {32}
    assert PRESETS["llama2-7b"].rope_theta == 10_000


def test_tiny_presets_are_one_of_each_family_and_have_the_vocabulary_of_bytes():
    tiny = [PRESETS[name] for name in TINY_PRESETS]
    assert {spec.family for spec in tiny} == {"llama", "gpt2", "opt"}
    assert {spec.vocab for spec in tiny} == {BYTE_VOCAB}
    assert all(spec.parameters < 10e6 for spec in tiny)


def test_published_models_are_in_bfloat16_unless_another_dtype_is_asked_for():
    for name, spec in PRESETS.items():
        assert load_model_spec(name).dtype == ("float32" if name in TINY_PRESETS else "bfloat16")
        assert load_model_spec(name) == spec
        assert load_model_spec(name, "float64").dtype == "float64"


def test_an_unknown_name_is_refused_with_the_nearest_preset():
    with pytest.raises(
        UserError, match=r"no model preset or directory named 'lama2-7b'; did you mean 'llama2-7b'\?"
    ):
        load_model_spec("lama2-7b")
