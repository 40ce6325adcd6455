"""Tasks that adapt some layers alone, beside tasks that adapt all: as peft has them, on two stages."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel

from muxtune.peft import attachments
from muxtune.peft.lora import LoraSpec
from runtime.backbone.hugging_face import load_hf_model
from runtime.backbone.stage import Stage
from runtime.data.batch import build_microbatch
from runtime.peft import RUNTIME_METHODS
from runtime.tasks.adapter_files import initial_adapter, load_adapter, save_adapter
from runtime.tasks.gradients import squared_gradient_norms
from runtime.tasks.tenant import Tenant
from tests.runtime.backbone.test_stage import make_stages
from tests.runtime.worlds import BACKBONES, lay_out, make_task, make_tenant


def subset(task_id: str, layers: tuple[int, ...], targets: tuple[str, ...]):
    peft = LoraSpec(method="lora", r=3, alpha=6.0, targets=targets, layers=layers)
    return make_task(task_id).model_copy(update={"peft": peft})


@pytest.mark.parametrize("targets", [("q_proj", "down_proj"), ("all-linear",)], ids=str)
def test_peft_starts_with_tensors_of_the_chosen_layers_alone(targets, tmp_path):
    model = BACKBONES["llama"]
    task = subset("a", (1,), targets)
    initial_adapter(model, task, tmp_path)
    keys = load_adapter(tmp_path).keys()
    assert keys
    assert all(f"{model.layer_prefix}.1." in key for key in keys)
    assert len(keys) == 2 * len(attachments(task.peft, model, 1))
    assert not attachments(task.peft, model, 0)


def test_a_stage_without_a_tensor_of_a_task_has_a_tenant_all_the_same(tmp_path):
    model = BACKBONES["llama"]
    task = subset("a", (1,), ("q_proj",))
    initial_adapter(model, task, tmp_path)
    weights = load_hf_model(model)
    stage = Stage(model, range(1), first=True, last=False, weights=weights)
    stage.add_task(task, load_adapter(tmp_path))
    tenant = Tenant(task, stage.task_parameters("a"), stage.task_portions("a"))
    (norm,) = squared_gradient_norms([tenant])
    assert float(norm) == 0.0
    assert float(norm) <= tenant.most_squared_norm
    tenant.step(0, norm.sqrt())
    assert tenant.is_finite()
    assert (tenant.adapter_bytes, tenant.optimizer_bytes) == (0, 0)
    again = Tenant(task, {})
    again.restore(tenant.snapshot())


def test_the_reference_is_pefts_with_the_same_layers(tmp_path):
    model = BACKBONES["llama"]
    task = subset("a", (0,), ("v_proj",))
    initial_adapter(model, task, tmp_path)
    reference = RUNTIME_METHODS.get("lora").reference(load_hf_model(model), task, model)
    ours = load_adapter(tmp_path)
    assert reference.state().keys() == ours.keys()
    assert all(torch.equal(tensor, ours[key]) for key, tensor in reference.state().items())


@pytest.mark.parametrize(
    "layers",
    [((0, 1, 2, 3), (1, 3), (3,)), ((3,), (3,), (3,)), ((2,), (3,), (0,))],
    ids=["one everywhere", "none on the first stage", "each on other layers"],
)
def test_chosen_layers_train_as_they_do_alone_with_peft(layers, tmp_path):
    spec = BACKBONES["llama"]
    tasks = [subset(name, own, ("q_proj", "down_proj")) for name, own in zip("abc", layers, strict=True)]
    tenants = [
        make_tenant(spec, task, lengths, tmp_path / task.id)
        for task, lengths in zip(tasks, ([3, 17, 5, 5], [30, 29, 2], [9]), strict=True)
    ]
    stages = make_stages(spec, tenants, split=(0, 2))
    layout = lay_out(tenants, "pack")
    batch = build_microbatch(layout, [t.examples for t in tenants], task_ids=[t.task.id for t in tenants])
    first = stages[0].forward(batch, None)
    hidden = first.detach().requires_grad_()
    losses_K = stages[1].forward(batch, hidden)
    losses_K.sum().backward()
    assert first.requires_grad == any(layer < 2 for own in layers for layer in own)
    if first.requires_grad:
        first.backward(hidden.grad)
    for i, tenant in enumerate(tenants):
        save_adapter(tmp_path / "solo", tenant.adapter, like=tenant.folder)
        solo = PeftModel.from_pretrained(load_hf_model(spec), tmp_path / "solo", is_trainable=True).eval()
        loss = sum(
            torch.nn.functional.cross_entropy(
                solo(input_ids=torch.from_numpy(e.tokens)[None]).logits[0, e.target_start - 1 : -1],
                torch.from_numpy(e.tokens[e.target_start :]),
                reduction="sum",
            )
            for e in tenant.examples
        )
        assert float(losses_K[i]) == pytest.approx(float(loss), rel=1e-10)
        loss.backward()
        ours = stages[0].task_parameters(tenant.task.id) | stages[1].task_parameters(tenant.task.id)
        theirs = {n.replace(".default", ""): p for n, p in solo.named_parameters() if p.requires_grad}
        assert ours.keys() == theirs.keys()
        for key, parameter in theirs.items():
            torch.testing.assert_close(ours[key].grad, parameter.grad, rtol=1e-7, atol=1e-10)
