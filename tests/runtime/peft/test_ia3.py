"""IA3 beside other tasks against peft's own, alone."""

from __future__ import annotations

from dataclasses import replace

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict

from muxtune.peft.ia3 import Ia3Spec
from muxtune.peft.lora import LoraSpec
from runtime.backbone.hugging_face import load_hf_model
from runtime.peft import RUNTIME_METHODS
from runtime.peft.ia3 import scaled
from runtime.tasks.adapter_files import initial_adapter, load_adapter, save_adapter
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
from tests.runtime.worlds import BACKBONES, LLAMA, make_task, solo_losses

STEPS = {"llama": 20, "gpt2": 6, "opt": 6}
TARGETS = {
    "llama": (("k_proj", "v_proj", "down_proj"), ("down_proj",)),
    "gpt2": (("c_attn", "mlp.c_proj"), ("mlp.c_proj",)),
    "opt": (("q_proj", "k_proj", "fc1", "fc2"), ("fc1", "fc2")),
}
HEADS = {"heads": 4, "kv_heads": 4, "head_dim": 6}


def ia3(targets, feedforward=(), layers=None) -> Ia3Spec:
    return Ia3Spec(method="ia3", targets=targets, feedforward=feedforward, layers=layers)


def lora(r: int) -> LoraSpec:
    return LoraSpec(method="lora", r=r, alpha=2.0 * r, targets=("all-linear",))


def solo(spec, weights, tenant, steps) -> Result:
    """Peft's own training, configured by hand."""
    own: Ia3Spec = tenant.task.peft
    layers = range(spec.layers) if own.layers is None else own.layers
    paths = {
        names: [
            f"{spec.layer_prefix}.{layer}.{linear.name}"
            for layer in layers
            for linear in spec.linears
            if names == ("all-linear",) or any(f".{linear.name}".endswith(f".{name}") for name in names)
        ]
        for names in (own.targets, own.feedforward)
    }
    config = peft.IA3Config(
        target_modules=paths[own.targets],
        feedforward_modules=paths[own.feedforward],
        fan_in_fan_out=spec.transposed_weights,
    )
    model = load_hf_model(spec)
    model.load_state_dict(weights.state_dict())
    model = get_peft_model(model, config).eval()
    return alone(
        model,
        lambda: {key: tensor.clone() for key, tensor in get_peft_model_state_dict(model).items()},
        tenant,
        steps=steps,
    )


@pytest.mark.parametrize("family", BACKBONES)
def test_losses_and_vectors_equal_pefts_beside_other_tasks(family, tmp_path):
    spec = BACKBONES[family].model_copy(update={"layers": 2})
    weights = random_weights(spec)
    pefts = [ia3(*TARGETS[family]), lora(3), ia3(("all-linear",), layers=(1,))]
    tenants = make_tenants(spec, pefts, tmp_path)
    ours = together(spec, tenants, weights, steps=STEPS[family])
    for i in (0, 2):
        assert_same(ours[i], solo(spec, weights, tenants[i], STEPS[family]))


def test_a_feedforward_linear_that_shares_its_product_is_computed_again_for_the_task(tmp_path):
    spec = LLAMA.model_copy(update={"layers": 2})
    weights = random_weights(spec)
    pefts = [ia3(("q_proj", "up_proj", "down_proj"), ("q_proj", "up_proj")), lora(3)]
    tenants = make_tenants(spec, pefts, tmp_path)
    ours = together(spec, tenants, weights, steps=5, alignment="chunk")
    assert_same(ours[0], solo(spec, weights, tenants[0], 5))


@pytest.mark.parametrize(
    ("spec", "targets", "tp"),
    [
        (LLAMA, TARGETS["llama"], 4),  # ranks share key and value heads
        (LLAMA, (("o_proj", "up_proj", "q_proj"), ("up_proj",)), 2),
        (BACKBONES["gpt2"].model_copy(update=HEADS | {"ffn": 57, "vocab": 51}), TARGETS["gpt2"], 2),
        (BACKBONES["opt"].model_copy(update=HEADS), TARGETS["opt"], 2),
    ],
    ids=["llama-4", "llama", "gpt2", "opt"],
)
def test_shards_equal_the_whole(spec, targets, tp, tmp_path):
    spec = spec.model_copy(update={"layers": 2})
    weights = random_weights(spec)
    tenants = make_tenants(spec, [ia3(*targets), lora(3)], tmp_path, max_grad_norm=0.05, weight_decay=0.1)
    whole = together(spec, tenants, weights, steps=4)
    ranks = ThreadTeam(tp).run(lambda shard: train_together(spec, tenants, weights, steps=4, shard=shard))
    for losses, _ in ranks:
        assert_same(Result(losses[0], whole[0].adapter), whole[0])
    assert_same(Result(whole[0].losses, assemble([parts[0] for _, parts in ranks])), whole[0], 1e-8)


def test_a_saved_adapter_loads_with_peft_and_gives_the_same_losses(tmp_path):
    spec = LLAMA.model_copy(update={"layers": 2})
    weights = random_weights(spec)
    tenants = make_tenants(spec, [ia3(*TARGETS["llama"], layers=(1,)), lora(3)], tmp_path)
    before, parts = train_together(spec, tenants, weights, steps=3)
    save_adapter(tmp_path / "saved", assemble([parts[0]]), like=tenants[0].folder)
    tenants[0] = replace(tenants[0], adapter=load_adapter(tmp_path / "saved"))
    losses, _ = train_together(spec, tenants, weights, steps=1)
    loaded = PeftModel.from_pretrained(weights, tmp_path / "saved").eval()
    with torch.no_grad():
        found = float(solo_losses(loaded, tenants[0].examples)) / targets_of(tenants[0])
    assert losses[0][0] == pytest.approx(found, rel=1e-10)
    assert losses[0][0] != pytest.approx(before[0][0], rel=1e-6)


@pytest.mark.parametrize("layers", [None, (1,)])
def test_it_starts_as_the_reference_does(layers, tmp_path):
    task = make_task("a").model_copy(update={"peft": ia3(*TARGETS["llama"], layers=layers)})
    initial_adapter(LLAMA, task, tmp_path)
    reference = RUNTIME_METHODS.get("ia3").reference(load_hf_model(LLAMA), task, LLAMA)
    ours = load_adapter(tmp_path)
    assert reference.state().keys() == ours.keys()
    assert all(torch.equal(tensor, tensor) and tensor.eq(1).all() for key, tensor in ours.items())
    assert len(ours) == 3 * (LLAMA.layers if layers is None else 1)


def test_gradients_of_bfloat16_rows_are_those_of_autograd():
    torch.manual_seed(0)
    y = torch.randn(7, 5).bfloat16()
    vector = torch.randn(5, requires_grad=True)
    ours, theirs = (y.clone().requires_grad_() for _ in range(2))
    grad = torch.randn(7, 5).bfloat16()
    (expected,) = torch.autograd.grad((theirs * vector).to(y.dtype), vector, grad)
    result = scaled(ours, vector)
    assert result.dtype == y.dtype
    result.backward(grad)
    torch.testing.assert_close(vector.grad, expected)
    assert ours.grad.dtype == y.dtype
