"""Targets of an adapter are those of PEFT."""

import pytest
from peft import LoraConfig, get_peft_model

from muxtune.model import PRESETS, load_model_spec
from muxtune.support.errors import SpecError
from tests.muxtune.model.configs import hf_config, hf_model

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
    "opt-tiny": [
        ["q_proj", "v_proj", "fc1"],
        ["out_proj"],
        ["self_attn.k_proj", "fc2"],
        ["fc"],
        ["o_proj"],
        ["self_attn.fc1"],
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
        r=2, target_modules=targets, task_type="CAUSAL_LM", fan_in_fan_out=spec.transposed_weights
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
