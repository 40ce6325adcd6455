"""A backbone's linears, dtype and size on loading."""

from muxtune.model import PRESETS, load_model_spec


def test_linears_that_read_the_same_tensor_are_of_one_block():
    blocks = {
        "llama-tiny": (0, 0, 0, 1, 2, 2, 3),
        "gpt2-tiny": (0, 1, 2, 3),
        "opt-tiny": (0, 0, 0, 1, 2, 3),
    }
    assert {name: tuple(x.block for x in PRESETS[name].linears) for name in blocks} == blocks


def test_dtype_is_that_of_weights_and_activations():
    assert [load_model_spec("llama-tiny", d).dtype_bytes for d in ("float32", "float64", "bfloat16")] == [
        4,
        8,
        2,
    ]
    assert load_model_spec("llama-tiny").dtype == "float32"


def test_a_preset_is_loaded_in_float32_and_a_directory_as_it_is():
    preset = PRESETS["llama2-7b"]
    assert preset.loading_bytes == 4 * 6_738_415_616
    assert preset.model_copy(update={"source": "/models/llama"}).loading_bytes == 2 * 6_738_415_616
    assert load_model_spec("llama2-7b", "float64").loading_bytes == 8 * 6_738_415_616
