"""Targets, exclusions and patterns match what peft's own model has; what would mean nothing is refused."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from muxtune.model import FAMILIES, load_model_spec
from muxtune.peft import METHODS, attachments, module_path, targeted_paths
from muxtune.peft.lora import LoraSpec
from muxtune.peft.targets import _other_modules
from muxtune.support.errors import SpecError
from runtime.backbone.hugging_face import hf_config

PRESETS = {"llama": "llama-tiny", "gpt2": "gpt2-tiny", "opt": "opt-tiny"}


def skeleton(spec):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(hf_config(spec))


def lora(**fields) -> LoraSpec:
    return LoraSpec.model_validate({"method": "lora", "r": 2, "alpha": 4, "targets": "all-linear"} | fields)


def pefts_ranks(spec, **arguments):
    """Rank and scale by path of the linears that peft adapts."""
    config = LoraConfig(**{"r": 2, "lora_alpha": 4, "task_type": "CAUSAL_LM"} | arguments)
    config.fan_in_fan_out = spec.transposed_weights
    model = get_peft_model(skeleton(spec), config)
    return {
        name.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }


def our_ranks(spec, peft):
    METHODS.get("lora").check(peft, spec, "peft")
    return {
        path: (each.adapter.dims[2], peft.scale(path))
        for layer in range(spec.layers)
        for each in attachments(peft, spec, layer)
        for path in [module_path(spec, layer, each.site.path)]
    }


SAME = {
    "llama": [
        {"targets": "all-linear"},
        {"targets": ["q_proj", "mlp.down_proj"]},
        {"targets": ["model.layers.1.self_attn.q_proj", "v_proj"], "layers": [0]},
        {"targets": r".*\.(q|v)_proj"},
        {"targets": r"model\.layers\.[13]\.mlp\.(gate|up|down)_proj"},
        {"targets": "model.layers.0.self_attn.q_proj"},
        {"targets": "all-linear", "exclude_modules": ["k_proj", "0.self_attn.q_proj"]},
        {"targets": "all-linear", "exclude_modules": r".*\.0\..*"},
        {"targets": r".*mlp\..*", "exclude_modules": r".*act_fn"},
        {"rank_pattern": {"q_proj": 7, "down_proj": 1}, "alpha_pattern": {"q_proj": 9}},
        {"rank_pattern": {r"layers\.[02]\.self_attn\.q_proj": 7}, "use_rslora": True},
        {"rank_pattern": {r"model\.layers\.1\..*": 3, "_proj": 5}} | {"rank_pattern": {".*_proj": 5}},
        {"targets": ["q_proj", "v_proj"], "alpha_pattern": {"self_attn.v_proj": 3.5}},
    ],
    "gpt2": [
        {"targets": ["c_proj"]},
        {"targets": ["c_attn", "mlp.c_proj"], "rank_pattern": {"attn.c_attn": 5}},
        {"targets": r"transformer\.h\.\d\.(attn|mlp)\.c_.*"},
        {"targets": ["c_proj"], "exclude_modules": ["attn.c_proj"]},
    ],
    "opt": [
        {"targets": r".*(fc1|q_proj)", "alpha_pattern": {"fc1": 2}},
        {"targets": ["fc2", "out_proj"], "exclude_modules": ["3.fc2"]},
    ],
}


@pytest.mark.parametrize(
    ("family", "fields"), [(family, each) for family, cases in SAME.items() for each in cases], ids=str
)
def test_ranks_and_scales_are_those_of_peft(family, fields):
    spec = load_model_spec(PRESETS[family])
    names = {"targets": "target_modules", "layers": "layers_to_transform"}
    arguments = {"target_modules": "all-linear"} | {names.get(k, k): v for k, v in fields.items()}
    expected = pefts_ranks(spec, **arguments)
    assert expected
    assert our_ranks(spec, lora(**fields)) == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"targets": ["lm_head"]},
            "peft.targets = 'lm_head': expected a linear of llama-tiny: q_proj, k_proj,",
        ),
        ({"targets": ["mlp"]}, "peft.targets = 'mlp': expected a linear of llama-tiny"),
        (
            {"targets": r".*\.fc1"},
            r"peft.targets = '.*\\.fc1': expected a regular expression that matches the",
        ),
        (
            {"targets": "self_attn.q_proj"},
            "as model.layers.0.self_attn.q_proj; its linears are q_proj, k_proj",
        ),
        ({"targets": r".*(q_proj|lm_head)"}, "expected linears of layers alone, and it matches lm_head"),
        (
            {"targets": r".*\.mlp\..*"},
            "and it matches model.layers.0.mlp.act_fn: name them, or exclude_modules",
        ),
        ({"exclude_modules": ["head"]}, "peft.exclude_modules = 'head': expected a linear of llama-tiny"),
        (
            {"exclude_modules": ".*"},
            "peft.exclude_modules = '.*': expected some of the linears that targets match",
        ),
        (
            {"rank_pattern": {"fc1": 4}},
            "peft.rank_pattern = 'fc1': expected an adapted linear: q_proj, k_proj",
        ),
        (
            {"targets": ["q_proj"], "alpha_pattern": {"v_proj": 4}},
            "peft.alpha_pattern = 'v_proj': expected an",
        ),
        (
            {"rank_pattern": {"q_proj": 300}},
            "peft.rank_pattern = 300: expected at most 256 at model.layers.0.sel",
        ),
        ({"rank_pattern": {"q_proj": 4, ".*_proj": 3}}, "peft saves patterns in alphabetical order"),
    ],
)
def test_what_matches_nothing_or_too_much_is_refused_with_what_there_is(fields, message):
    with pytest.raises(SpecError) as caught:
        METHODS.get("lora").check(lora(**fields), load_model_spec("llama-tiny"), "peft")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_biases_of_norms_are_refused_and_missing_ones_are_none():
    with pytest.raises(
        SpecError, match=r"peft\.bias = 'all': expected none or lora_only: the norms of opt-tiny"
    ):
        METHODS.get("lora").check(lora(bias="all"), load_model_spec("opt-tiny"), "peft")
    llama = load_model_spec("llama-tiny")
    for bias in ("lora_only", "all"):
        METHODS.get("lora").check(lora(bias=bias), llama, "peft")
        assert attachments(lora(bias=bias), llama, 0) == attachments(lora(), llama, 0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"targets": "q_proj, v_proj"}, "expected a list, as [q_proj, v_proj], or all-linear"),
        ({"targets": "(q_proj"}, "expected a regular expression (missing )"),
        ({"targets": []}, "expected a list of at least one name"),
        ({"targets": [3]}, "expected a list of at least one name"),
        ({"targets": r".*q_proj", "layers": [0]}, "expected the layers inside of the regular expression"),
        (
            {"modules_to_save": ["lm_head"]},
            "expected null: the backbone is shared, so none of its modules is",
        ),
        ({"rank_pattern": {"q_proj": 0}}, "expected whole ranks above 0 for each name; 'q_proj' has 0"),
        ({"rank_pattern": {"q_proj": 2.5}}, "expected whole ranks above 0"),
        ({"rank_pattern": ["q_proj"]}, "expected"),
        ({"alpha_pattern": {"(": 2}}, "expected names or regular expressions, '(' is neither"),
        ({"bias": "some"}, "Input should be 'none', 'lora_only' or 'all'"),
    ],
)
def test_what_cannot_be_read_is_refused(fields, message):
    with pytest.raises(ValidationError) as caught:
        lora(**fields)
    assert message in str(caught.value)


def test_a_specification_is_written_without_what_it_does_not_say_and_read_back():
    plain = lora()
    assert set(plain.model_dump()) == {"method", "r", "alpha", "targets", "dropout"}
    full = lora(
        targets=r".*\.(q|v)_proj",
        rank_pattern={"q_proj": 3},
        alpha_pattern={"v_proj": 1},
        use_dora=True,
        bias="lora_only",
        exclude_modules=["0.self_attn.v_proj"],
    )
    assert LoraSpec.model_validate_json(full.model_dump_json()) == full
    assert hash(full) == hash(LoraSpec.model_validate(full.model_dump()))


def test_layers_that_are_alike_get_one_object():
    llama = load_model_spec("llama-tiny")
    peft = lora(rank_pattern={r"layers\.1\..*": 3})
    every = [attachments(peft, llama, layer) for layer in range(llama.layers)]
    assert every[0] is every[2] is every[3]
    assert every[0] != every[1]


@pytest.mark.parametrize("family", PRESETS)
def test_all_modules_of_a_backbone_are_known(family):
    spec = load_model_spec(PRESETS[family])
    linears = {module_path(spec, i, linear.name) for i in range(spec.layers) for linear in spec.linears}
    assert linears | set(_other_modules(spec)) == {n for n, _ in skeleton(spec).named_modules() if n}
    assert FAMILIES[family].layers in set(_other_modules(spec))


NAMES = {
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
    ("name", "targets"), [(name, targets) for name, every in NAMES.items() for targets in every], ids=str
)
def test_names_match_what_peft_matches(name, targets):
    spec = load_model_spec(name)
    config = LoraConfig(
        r=2, target_modules=targets, task_type="CAUSAL_LM", fan_in_fan_out=spec.transposed_weights
    )
    try:
        model = get_peft_model(skeleton(spec), config)
    except ValueError:  # nothing matches, or something that is no linear
        with pytest.raises((SpecError, ValidationError), match=r"expected a (linear of|valid list|list of)"):
            METHODS.get("lora").check(lora(targets=targets), spec, "tasks.t.peft")
        return
    adapted = {
        path.removeprefix("base_model.model.").removesuffix(".lora_A.default")
        for path, _ in model.named_modules()
        if path.endswith(".lora_A.default")
    }
    paths = enumerate(targeted_paths(lora(targets=targets), spec))
    assert {module_path(spec, layer, path) for layer, own in paths for path in own} == adapted


@pytest.mark.parametrize("targets", [("q_proj", "nope"), ("all-linear", "q_proj"), ("c_attn",)])
def test_one_name_without_a_match_is_refused_even_beside_others(targets):
    with pytest.raises(SpecError) as caught:
        METHODS.get("lora").check(lora(targets=targets), load_model_spec("llama-tiny"), "tasks.t.peft")
    wrong = next(t for t in targets if t != "q_proj")
    assert str(caught.value) == (
        f"tasks.t.peft.targets = {wrong!r}: expected a linear of llama-tiny: q_proj, k_proj, v_proj, o_proj, "
        "gate_proj, up_proj, down_proj, or all-linear alone"
    )
