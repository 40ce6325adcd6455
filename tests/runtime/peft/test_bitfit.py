"""BitFit beside other tasks against plain torch, alone."""

from __future__ import annotations

import json

import pytest
import torch

from muxtune.peft.bitfit import BitFitSpec
from muxtune.peft.lora import LoraSpec
from runtime.backbone.hugging_face import load_hf_model
from runtime.peft import RUNTIME_METHODS
from runtime.tasks.adapter_files import save_adapter
from tests.documents import load_page
from tests.runtime.backbone.test_sharded_stage import ThreadTeam
from tests.runtime.peft.training import (
    Result,
    alone,
    assemble,
    assert_same,
    make_tenants,
    random_weights,
    targets_of,
    together,
    train_together,
)
from tests.runtime.worlds import BACKBONES, LLAMA, solo_losses

STEPS = {"llama": 20, "gpt2": 6, "opt": 6}
HEADS = {"heads": 4, "kv_heads": 4, "head_dim": 6}


def bitfit(layers=None) -> BitFitSpec:
    return BitFitSpec(method="bitfit", layers=layers)


def lora(r: int) -> LoraSpec:
    return LoraSpec(method="lora", r=r, alpha=2.0 * r, targets=("all-linear",))


def solo(spec, weights, tenant, steps) -> Result:
    """The model of transformers whose linears' own biases require gradients."""
    model = load_hf_model(spec).requires_grad_(False).eval()
    model.load_state_dict(weights.state_dict())
    before, trained = dict(weights.named_parameters()), {}
    layers = range(spec.layers) if tenant.task.peft.layers is None else tenant.task.peft.layers
    for layer in layers:
        for linear in spec.linears:
            key = f"{spec.layer_prefix}.{layer}.{linear.name}.bias"
            if spec.has_bias(linear):
                trained[key] = model.get_parameter(key).requires_grad_()
    return alone(
        model,
        lambda: {key: (p - before[key]).detach() for key, p in trained.items()},
        tenant,
        steps=steps,
    )


@pytest.mark.parametrize("family", BACKBONES)
def test_losses_and_biases_equal_those_of_biases_with_gradients(family, tmp_path):
    spec = BACKBONES[family].model_copy(update={"layers": 2})
    weights = random_weights(spec)
    tenants = make_tenants(spec, [bitfit(), lora(3), bitfit((1,))], tmp_path)
    ours = together(spec, tenants, weights, steps=STEPS[family])
    for i in (0, 2):
        assert_same(ours[i], solo(spec, weights, tenants[i], STEPS[family]))


def test_only_linears_with_a_bias_are_trained(tmp_path):
    spec = LLAMA.model_copy(update={"layers": 2, "mlp_bias": False})
    weights = random_weights(spec)
    tenants = make_tenants(spec, [bitfit(), lora(3)], tmp_path)
    ours = together(spec, tenants, weights, steps=4, alignment="pad")
    assert_same(ours[0], solo(spec, weights, tenants[0], 4))
    assert not [key for key in ours[0].adapter if ".mlp." in key]


@pytest.mark.parametrize(
    ("spec", "tp"),
    [
        (LLAMA, 4),  # ranks share key and value heads
        (BACKBONES["gpt2"].model_copy(update=HEADS | {"ffn": 57, "vocab": 51}), 2),
        (BACKBONES["opt"].model_copy(update=HEADS), 2),
    ],
    ids=["llama-4", "gpt2", "opt"],
)
def test_shards_equal_the_whole(spec, tp, tmp_path):
    spec = spec.model_copy(update={"layers": 2})
    weights = random_weights(spec)
    tenants = make_tenants(spec, [bitfit(), lora(3)], tmp_path, max_grad_norm=0.05, weight_decay=0.1)
    whole = together(spec, tenants, weights, steps=4)
    ranks = ThreadTeam(tp).run(lambda shard: train_together(spec, tenants, weights, steps=4, shard=shard))
    for losses, _ in ranks:
        assert_same(Result(losses[0], whole[0].adapter), whole[0])
    assert_same(Result(whole[0].losses, assemble([parts[0] for _, parts in ranks])), whole[0], 1e-8)


def test_with_decay_the_reference_pulls_towards_the_biases_of_the_backbone(tmp_path):
    spec = BACKBONES["opt"].model_copy(update={"layers": 2})
    weights = random_weights(spec)
    tenants = make_tenants(spec, [bitfit(), lora(3)], tmp_path, weight_decay=0.5)
    ours = together(spec, tenants, weights, steps=4)
    reference = RUNTIME_METHODS.get("bitfit").reference(weights, tenants[0].task, spec)
    assert_same(ours[0], alone(reference.module, reference.state, tenants[0], steps=4))


def test_a_saved_adapter_is_added_to_a_plain_model_by_name(tmp_path):
    spec = BACKBONES["gpt2"].model_copy(update={"layers": 2})
    weights = random_weights(spec)
    tenants = make_tenants(spec, [bitfit(), lora(3)], tmp_path)
    ours = together(spec, tenants, weights, steps=3)
    save_adapter(tmp_path / "saved", ours[0].adapter, like=tenants[0].folder)
    after = together(
        spec,
        [type(t)(t.task, t.examples, own.adapter, t.folder) for t, own in zip(tenants, ours, strict=True)],
        weights,
        steps=1,
    )
    names: dict[str, object] = {}
    exec(load_page("docs/vectors-and-entries.md").example("load_difference.py"), names)
    names["load_difference"](weights, tmp_path / "saved")
    with torch.no_grad():
        found = float(solo_losses(weights, tenants[0].examples)) / targets_of(tenants[0])
    assert after[0].losses[0] == pytest.approx(found, rel=1e-10)
    config = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert config == {"method": "bitfit", "seed": 1, "base_model_name_or_path": "gpt2-test"}
