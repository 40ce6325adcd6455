"""Bottleneck adapters in a stage, mixed with LoRA, against plain torch on the model of transformers."""

# t tokens, D hidden size

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  # torch's own abbreviation

from muxtune.graph.operators import Operator
from muxtune.peft import attachments
from muxtune.peft.bottleneck import BottleneckSpec
from runtime.backbone.hugging_face import load_hf_model
from runtime.backbone.stage import Stage
from runtime.data.batch import build_microbatch
from runtime.distributed.sharding import Shard, assemble
from runtime.operators import TorchOperators
from runtime.peft import RUNTIME_METHODS
from runtime.tasks.adapter_files import load_adapter, save_adapter
from tests.documents import load_page
from tests.runtime.backbone.test_sharded_stage import SPECS, ThreadTeam, gradients, play, random_weights
from tests.runtime.worlds import BACKBONES, lay_out, make_task, make_tenant, solo_losses

HOULSBY = {"size": 6}
PFEIFFER = {"size": 5, "blocks": ["mlp"], "activation": "relu"}
PARALLEL = {"size": 4, "placement": "parallel", "scale": 4.0, "activation": "silu"}
SOME_LAYERS = {
    "size": 3,
    "placement": "parallel",
    "blocks": ["attention"],
    "layers": [1],
    "activation": "tanh",
}
SMALL = {family: spec.model_copy(update={"layers": 2}) for family, spec in BACKBONES.items()}
VARIANTS = {"houlsby": HOULSBY, "pfeiffer": PFEIFFER, "parallel": PARALLEL, "some-layers": SOME_LAYERS}


def bottleneck_task(task_id: str, fields: dict, **changes):
    return make_task(task_id, peft={"method": "bottleneck", **fields}, **changes)


def loss_by_hooks(spec, task, adapter, examples) -> torch.Tensor:
    """Loss by transformers' own model, whose blocks are changed where they return."""
    model = load_hf_model(spec)
    peft = task.peft
    decoder = model.get_submodule(spec.layer_prefix.rpartition(".")[0])
    act = getattr(F, peft.activation)
    for number, layer in enumerate(getattr(decoder, spec.layer_prefix.rpartition(".")[2])):
        if peft.layers is not None and number not in peft.layers:
            continue
        ends = {
            "llama": {
                "attention": ("input_layernorm", "self_attn"),
                "mlp": ("post_attention_layernorm", "mlp"),
            },
            "gpt2": {"attention": ("ln_1", "attn"), "mlp": ("ln_2", "mlp")},
            "opt": {"attention": ("self_attn_layer_norm", "self_attn"), "mlp": ("final_layer_norm", "fc2")},
        }[spec.family]
        for block in peft.blocks:
            norm, module = (layer.get_submodule(name) for name in ends[block])
            path = f"{spec.layer_prefix}.{number}.{block}"
            w = [adapter[f"{path}.{name}"] for name in ("down.weight", "down.bias", "up.weight", "up.bias")]
            normed = []
            norm.register_forward_hook(lambda m, x, y, normed=normed: normed.append(y))

            def change(m, x, y, w=w, normed=normed):
                out = y[0] if isinstance(y, tuple) else y
                read = normed.pop() if peft.placement == "parallel" else out
                out = out + peft.scale * F.linear(act(F.linear(read.view(out.shape), *w[:2])), *w[2:])
                return (out, *y[1:]) if isinstance(y, tuple) else out

            module.register_forward_hook(change)
    return solo_losses(model, examples)


def mixed_tenants(spec, folder, variants=VARIANTS):
    tasks = [bottleneck_task(name, fields, seed=i) for i, (name, fields) in enumerate(variants.items())]
    tasks.insert(1, make_task("lora", r=3))
    lengths = [[7, 12], [9, 4], [5], [3, 3, 20], [11, 2]]
    return [make_tenant(spec, t, own, folder / t.id) for t, own in zip(tasks, lengths, strict=False)]


@pytest.mark.parametrize("family", list(SMALL))
@pytest.mark.parametrize("alignment", ["pack", "chunk"])
def test_all_placements_in_one_batch_with_lora_equal_plain_torch(family, alignment, tmp_path):
    spec = SMALL[family]
    tenants = mixed_tenants(spec, tmp_path)
    stage = Stage(spec, range(spec.layers), first=True, last=True, weights=load_hf_model(spec))
    for tenant in tenants:
        stage.add_task(tenant.task, tenant.adapter)
    layout = lay_out(tenants, alignment, chunk_tokens=8)
    batch = build_microbatch(layout, [t.examples for t in tenants], task_ids=[t.task.id for t in tenants])
    losses_K = stage.forward(batch, None)
    losses_K.sum().backward()
    for tenant, loss in zip(tenants, losses_K, strict=True):
        if tenant.task.id == "lora":
            continue
        weights = {key: w.clone().requires_grad_() for key, w in tenant.adapter.items()}
        expected = loss_by_hooks(spec, tenant.task, weights, tenant.examples)
        torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
        expected.backward()
        ours = stage.task_parameters(tenant.task.id)
        assert ours.keys() == weights.keys()
        for key, w in weights.items():
            torch.testing.assert_close(ours[key].grad, w.grad, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_shards_equal_the_whole_stage_and_sum_no_gradient_twice(name, tmp_path):
    spec = SPECS[name].model_copy(update={"layers": 2})
    tenants = mixed_tenants(spec, tmp_path, {"houlsby": HOULSBY, "parallel": PARALLEL})
    batch = build_microbatch(
        lay_out(tenants, "pack"), [t.examples for t in tenants], task_ids=[t.task.id for t in tenants]
    )
    weights = random_weights(spec)
    whole_losses_K, whole, _ = play(spec, tenants, batch, weights, Shard())
    ranks = ThreadTeam(2).run(lambda shard: play(spec, tenants, batch, weights, shard))
    for i, tenant in enumerate(whole):
        assembled = assemble([gradients(own[i]) for _, own, _ in ranks])
        for losses_K, own, _ in ranks:
            torch.testing.assert_close(losses_K, whole_losses_K, rtol=1e-12, atol=1e-12)
            for key, parameter in tenant.parameters.items():
                torch.testing.assert_close(assembled[key], parameter.grad, rtol=1e-7, atol=1e-9)
                portion, part = gradients(own[i])[key]
                assert torch.equal(portion.take(assembled[key]), part)


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=list(VARIANTS))
def test_the_reference_starts_where_the_task_does_and_computes_the_same(fields, tmp_path):
    spec = SMALL["llama"]
    task = bottleneck_task("a", fields, seed=5)
    tenant = make_tenant(spec, task, [9, 4], tmp_path)
    reference = RUNTIME_METHODS.get("bottleneck").reference(load_hf_model(spec), task, spec)
    initial = load_adapter(tmp_path)
    assert reference.state().keys() == initial.keys()
    assert all(torch.equal(tensor, initial[key]) for key, tensor in reference.state().items())
    with torch.no_grad():
        plain = solo_losses(load_hf_model(spec), tenant.examples)
        assert torch.equal(solo_losses(reference.module, tenant.examples), plain)  # begins as the backbone
        trained = [p for p in reference.module.parameters() if p.requires_grad]
        assert len(trained) == len(initial)
        for parameter in trained:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        expected = loss_by_hooks(spec, task, reference.state(), tenant.examples)
        assert float(expected) != pytest.approx(float(plain), rel=1e-4)
        torch.testing.assert_close(solo_losses(reference.module, tenant.examples), expected)


@pytest.mark.parametrize("family", list(SMALL))
@pytest.mark.parametrize("fields", [HOULSBY, PARALLEL], ids=["serial", "parallel"])
def test_the_loader_of_the_documents_gives_the_same_model(family, fields, tmp_path):
    spec = SMALL[family]
    task = bottleneck_task("a", fields)
    tenant = make_tenant(spec, task, [9, 4], tmp_path / "init")
    save_adapter(tmp_path / "saved", tenant.adapter, like=tenant.folder)
    names: dict = {}
    exec(load_page("docs/bottleneck.md").example("load_bottleneck.py"), names)
    loaded = load_hf_model(spec)
    names["load_bottleneck"](loaded, tmp_path / "saved")
    expected = loss_by_hooks(spec, task, tenant.adapter, tenant.examples)
    torch.testing.assert_close(solo_losses(loaded, tenant.examples), expected)


@pytest.mark.parametrize("fields", [HOULSBY, PARALLEL], ids=["serial", "parallel"])
def test_beside_a_bfloat16_backbone_it_is_float32_and_rounded_once(fields, tmp_path):
    spec = SMALL["llama"].model_copy(update={"dtype": "bfloat16"})
    task = bottleneck_task("a", fields)
    tenant = make_tenant(spec, task, [9, 4], tmp_path)
    assert {tensor.dtype for tensor in tenant.adapter.values()} == {torch.float32}
    adapter = RUNTIME_METHODS.get("bottleneck")
    stage = Stage(spec, range(spec.layers), first=True, last=True, weights=load_hf_model(spec))
    stage.add_task(task, tenant.adapter)
    batch = build_microbatch(lay_out([tenant], "pack"), [tenant.examples], task_ids=["a"])
    (loss,) = stage.forward(batch, None)
    loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in stage.task_parameters("a").values())
    reference = adapter.reference(load_hf_model(spec), task, spec)
    for path, module in reference._adapters.items():
        module.load_state_dict(
            {k.removeprefix(f"{path}."): w for k, w in tenant.adapter.items() if k.startswith(path)}
        )
    expected = solo_losses(reference.module, tenant.examples)
    torch.testing.assert_close(loss.double(), expected, rtol=0.01, atol=0)  # bfloat16 has 8 bits


def test_the_profiler_can_build_it():
    spec = SMALL["llama"]
    forward, backward = TorchOperators().build(Operator("bottleneck", (24, 6, 10)), spec, "cpu")
    assert forward().shape == (10, 24)
    dy_tD, sums = backward()
    assert dy_tD.shape == (10, 24)
    assert [tuple(each.shape) for each in sums] == [(6, 24), (6,), (24, 6), (24,)]
    assert all(each.abs().max() > 0 for each in sums)


def test_a_task_trains_as_many_parameters_as_it_attaches(tmp_path):
    spec = SMALL["opt"]
    peft = BottleneckSpec(method="bottleneck", size=6)
    task = make_task("a", peft=peft)
    tenant = make_tenant(spec, task, [4], tmp_path)
    attached = spec.layers * sum(each.parameters for each in attachments(peft, spec))
    assert sum(tensor.numel() for tensor in tenant.adapter.values()) == attached
