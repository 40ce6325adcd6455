"""Tasks that adapt some layers alone, beside tasks that adapt all: as peft has them, on two stages."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from muxtune.peft import attachments
from muxtune.peft.lora import LoraSpec
from runtime.backbone.hugging_face import load_hf_model
from runtime.backbone.stage import Stage
from runtime.peft import RUNTIME_METHODS
from runtime.tasks.adapter_files import initial_adapter, load_adapter
from runtime.tasks.tenant import Tenant
from tests.runtime.worlds import BACKBONES, make_task


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
    tenant = Tenant(task, stage.task_parameters("a"), stage.task_cuts("a"))
    norm = tenant.squared_gradient_norm()
    assert float(norm) == 0.0
    assert not tenant.refuses(norm.sqrt())
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
