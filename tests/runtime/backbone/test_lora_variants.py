"""rsLoRA, DoRA, patterns, biases and targets of LoRA: mixed in one stream they train as each does with peft."""

# t tokens of one task, K active tasks

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

from muxtune.model import ModelSpec
from muxtune.peft.lora import LoraSpec
from runtime.backbone.hugging_face import load_hf_model
from runtime.backbone.stage import Stage
from runtime.data.batch import build_microbatch
from runtime.ops.dropout import keep_reference
from runtime.tasks.tenant import Tenant
from tests.runtime.worlds import BACKBONES, lay_out, make_task, make_tenant, solo_losses

STEPS = 20
ENDS = {"llama": ("q_proj", "down_proj"), "gpt2": ("c_attn", "mlp.c_proj"), "opt": ("v_proj", "fc2")}
"""A linear whose outputs are split over ranks, and one whose inputs are."""

# What a task writes, and what a tenant of peft writes for the same; {0} and {1} stand for the two linears.
VARIANTS = {
    "plain": ({}, {}),
    "rslora": ({"use_rslora": True}, {"use_rslora": True}),
    "patterns": (
        {"use_rslora": True, "rank_pattern": {"{1}": 1, "0.*": 2}, "alpha_pattern": {"1.*{0}": 3}},
        {"use_rslora": True, "rank_pattern": {"{1}": 1, "0.*": 2}, "alpha_pattern": {"1.*{0}": 3}},
    ),
    "dora": ({"use_dora": True}, {"use_dora": True}),
    "dropped dora": ({"use_dora": True, "dropout": 0.3}, {"use_dora": True, "lora_dropout": 0.3}),
    "dora with biases": (
        {"use_dora": True, "use_rslora": True, "bias": "lora_only"},
        {"use_dora": True, "use_rslora": True, "bias": "lora_only"},
    ),
    "dropped dora with biases": (
        {"use_dora": True, "dropout": 0.1, "bias": "lora_only"},
        {"use_dora": True, "lora_dropout": 0.1, "bias": "lora_only"},
    ),
    "biases": ({"bias": "lora_only"}, {"bias": "lora_only"}),
    "all biases": ({"bias": "all"}, {"bias": "all"}),
    "expression": (
        {"targets": r".*\.1\..*({0}|{1})", "use_dora": True},
        {"target_modules": r".*\.1\..*({0}|{1})", "use_dora": True},
    ),
    "excluded": ({"exclude_modules": ["0.{0}", "{1}"]}, {"exclude_modules": ["0.{0}", "{1}"]}),
}


def backbone(family: str) -> ModelSpec:
    return BACKBONES[family].model_copy(update={"layers": 2})


def filled(value, family: str):
    """The value with the names of the family's linears; patterns are told by where they stand in a path."""
    if isinstance(value, dict):
        return {filled(k, family): filled(v, family) for k, v in value.items()}
    if isinstance(value, list):
        return [filled(each, family) for each in value]
    if not isinstance(value, str):
        return value
    first, second = ENDS[family]
    if value == "0.{0}":
        layer = "attn" if family == "gpt2" else "self_attn"
        return f"0.{layer}.{first}"
    return value.replace("{0}", first).replace("{1}", second)


def random_weights(spec: ModelSpec):
    """Biases that transformers sets to 0 are moved, so that forgetting them shows."""
    model = load_hf_model(spec)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval()


def variant(name: str, family: str, r: int = 3):
    """A task, and the arguments of peft's configuration that it stands for."""
    ours, theirs = (filled(part, family) for part in VARIANTS[name])
    targets = ours.pop("targets", list(ENDS[family]))
    spec = LoraSpec.model_validate({"method": "lora", "r": r, "alpha": 5, "targets": targets, **ours})
    task = make_task(name.replace(" ", "-"), seed=len(name)).model_copy(update={"peft": spec})
    arguments = {"r": r, "lora_alpha": 5, "target_modules": targets, "task_type": "CAUSAL_LM", **theirs}
    return task, arguments | {"fan_in_fan_out": family == "gpt2"}


class Masks(torch.nn.Module):
    """Masks as the runtime defines them, in the place of peft's dropout."""

    def __init__(self, rate, seed, path):
        super().__init__()
        self.rate, self.seed, self.path = rate, seed, path
        self.place = (0, 0)

    def forward(self, x):
        step, sequence = self.place
        keep = keep_reference(
            self.seed,
            step,
            sequence,
            path=self.path,
            rate=self.rate,
            positions=range(x.shape[1]),
            features=range(x.shape[2]),
        )
        return x * torch.tensor(keep, dtype=x.dtype) / (1 - self.rate)


def solo(spec, task, arguments, examples, start, weights, steps):
    """Losses of every step, and the adapter behind them, by peft alone; dropout on in its modules alone."""
    model = get_peft_model(weights, LoraConfig(**arguments)).eval()
    masks = []
    for name, module in model.named_modules():
        if hasattr(module, "lora_dropout") and task.peft.dropout:
            path = name.removeprefix("base_model.model.")
            masks.append(Masks(task.peft.dropout, task.seed, path))
            module.lora_dropout["default"] = masks[-1]
            module.training = True
    set_adapter(model, start)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    losses = []
    for step in range(steps):
        total = 0.0
        for sequence, example in enumerate(examples):
            for mask in masks:
                mask.place = (step, sequence)
            loss = solo_losses(model, [example])
            loss.backward()
            total += float(loss.detach())
        losses.append(total)
        optimizer.step()
        optimizer.zero_grad()
    return losses, get_peft_model_state_dict(model)


@torch.no_grad()
def set_adapter(model, values):
    """Written by the names of the module's own tensors, so that nothing is left out silently."""
    own = {
        name.replace(".default", "").replace("lora_magnitude_vector.weight", "lora_magnitude_vector"): p
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    assert own.keys() == values.keys()
    for key, parameter in own.items():
        parameter.copy_(values[key])


def together(spec, tenants, weights, steps):
    """Losses ``[steps, K]`` of tasks in one stream, and the adapters behind them."""
    stage = Stage(spec, range(spec.layers), first=True, last=True, weights=weights)
    trained = []
    for tenant in tenants:
        stage.add_task(tenant.task, tenant.adapter)
        name = tenant.task.id
        trained.append(
            Tenant(
                tenant.task,
                stage.task_parameters(name),
                stage.task_portions(name),
                changed=lambda name=name: stage.renew(name),
            )
        )
    layout = lay_out(tenants, "pack")
    losses = []
    for step in range(steps):
        batch = build_microbatch(
            layout,
            [t.examples for t in tenants],
            task_ids=[t.task.id for t in tenants],
            dropout_seeds={i: t.task.seed for i, t in enumerate(tenants) if t.task.peft.dropout},
            step=step,
        )
        losses_K = stage.forward(batch, None)
        losses.append(losses_K.detach())
        losses_K.sum().backward()
        for tenant in trained:
            tenant.step(step, 0.0)
    return torch.stack(losses), [dict(t.snapshot()["adapter"]) for t in trained]


def make(spec, name, family, folder, lengths, weights):
    task, arguments = variant(name, family)
    task = task.model_copy(update={"learning_rate": 1e-2, "steps": STEPS})
    tenant = make_tenant(spec, task, lengths, folder / task.id)
    return tenant, arguments


@pytest.mark.parametrize("family", BACKBONES)
def test_all_together_they_train_as_each_does_with_peft_alone(family, tmp_path):
    spec = backbone(family)
    weights = random_weights(spec)
    names = [name for name in VARIANTS if name != "all biases" or spec.rms_norm]
    lengths = [[5, 9], [12], [3, 2, 7], [8]]
    made = [
        make(spec, name, family, tmp_path, lengths[i % len(lengths)], weights) for i, name in enumerate(names)
    ]
    losses, adapters = together(spec, [tenant for tenant, _ in made], weights, STEPS)
    for i, (tenant, arguments) in enumerate(made):
        copy = random_weights(spec)
        expected, adapter = solo(spec, tenant.task, arguments, tenant.examples, tenant.adapter, copy, STEPS)
        np.testing.assert_allclose(losses[:, i], expected, rtol=1e-9, atol=1e-9, err_msg=names[i])
        assert adapters[i].keys() == adapter.keys() == tenant.adapter.keys()
        for key, value in adapter.items():
            torch.testing.assert_close(
                adapters[i][key], value, rtol=1e-9, atol=1e-9, msg=f"{names[i]}: {key}"
            )
            assert not torch.equal(value, tenant.adapter[key]), f"{names[i]}: {key} was not trained"
