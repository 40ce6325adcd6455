"""LoRA's variants (rsLoRA, DoRA, patterns, biases, targets) train together as each does with peft alone."""

# t tokens of one task, K active tasks

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict

from muxtune.model import ModelSpec
from muxtune.peft.lora import LoraSpec
from runtime.backbone.hugging_face import load_hf_model
from runtime.backbone.stage import Stage
from runtime.data.batch import build_microbatch
from runtime.distributed.sharding import Shard, assemble
from runtime.tasks.adapter_files import initial_adapter, load_adapter, save_adapter
from runtime.tasks.gradients import sum_over_shards
from runtime.tasks.tenant import Tenant
from tests.integration.peft_dropout import PeftDropout
from tests.runtime.backbone.test_sharded_stage import SPECS, ThreadTeam
from tests.runtime.worlds import BACKBONES, lay_out, make_task, make_tenant, solo_losses

STEPS = {"llama": 20, "gpt2": 4, "opt": 4}
ENDS = {"llama": ("q_proj", "down_proj"), "gpt2": ("c_attn", "mlp.c_proj"), "opt": ("v_proj", "fc2")}
"""A linear whose outputs are split over ranks, and one whose inputs are."""

# What a task writes, and what a tenant of peft writes for the same; {0} and {1} stand for the two linears.
VARIANTS = {
    "plain": ({}, {}),
    "rslora": ({"use_rslora": True}, {"use_rslora": True}),
    "patterns": (
        {"use_rslora": True, "rank_pattern": {"1.*{0}": 2, "{1}": 1}, "alpha_pattern": {"0.*": 3}},
        {"use_rslora": True, "rank_pattern": {"1.*{0}": 2, "{1}": 1}, "alpha_pattern": {"0.*": 3}},
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


def backbone(family: str, **changes) -> ModelSpec:
    return BACKBONES[family].model_copy(update={"layers": 2} | changes)


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


def solo(spec, task, arguments, examples, start, weights, steps):
    """Losses of every step, and the adapter behind them, by peft alone; dropout on in its modules alone."""
    model = get_peft_model(weights, LoraConfig(**arguments)).eval()
    masks = PeftDropout(model, rate=task.peft.dropout, seed=task.seed)
    for module in model.modules():
        if hasattr(module, "lora_dropout"):
            module.training = True  # not those inside of it, nor the backbone's own dropout
    set_adapter(model, start)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    losses = []
    for step in range(steps):
        total = 0.0
        for sequence, example in enumerate(examples):
            masks.place = (step, sequence)
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
    task = task.model_copy(update={"learning_rate": 1e-2, "steps": STEPS[family]})
    tenant = make_tenant(spec, task, lengths, folder / task.id)
    return tenant, arguments


@pytest.mark.parametrize("family", BACKBONES)
def test_all_together_they_train_as_each_does_with_peft_alone(family, tmp_path):
    spec = backbone(family)
    weights = random_weights(spec)
    names = [name for name in VARIANTS if name != "all biases" or spec.rms_norm]
    lengths = [[5], [7], [3, 4], [6]]
    made = [
        make(spec, name, family, tmp_path, lengths[i % len(lengths)], weights) for i, name in enumerate(names)
    ]
    losses, adapters = together(spec, [tenant for tenant, _ in made], weights, STEPS[family])
    for i, (tenant, arguments) in enumerate(made):
        copy = random_weights(spec)
        expected, adapter = solo(
            spec, tenant.task, arguments, tenant.examples, tenant.adapter, copy, STEPS[family]
        )
        np.testing.assert_allclose(losses[:, i], expected, rtol=1e-9, atol=1e-9, err_msg=names[i])
        assert adapters[i].keys() == adapter.keys() == tenant.adapter.keys()
        for key, value in adapter.items():
            torch.testing.assert_close(
                adapters[i][key], value, rtol=1e-9, atol=1e-9, msg=f"{names[i]}: {key}"
            )
            assert not torch.equal(value, tenant.adapter[key]), f"{names[i]}: {key} was not trained"


@pytest.mark.parametrize("name", VARIANTS)
def test_it_starts_bitwise_as_pefts_own(name, tmp_path):
    for dtype in ("float32", "bfloat16"):
        spec = backbone("llama", dtype=dtype)
        task, arguments = variant(name, "llama")
        initial_adapter(spec, task, tmp_path)
        torch.manual_seed(task.seed)
        theirs = get_peft_model_state_dict(get_peft_model(load_hf_model(spec), LoraConfig(**arguments)))
        ours = load_adapter(tmp_path)
        assert ours.keys() == theirs.keys()
        for key, tensor in theirs.items():
            assert (ours[key].dtype, ours[key].shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(ours[key], tensor), f"{name}: {key}"


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("name", [name for name in VARIANTS if "dropped" not in name])
def test_saved_it_loads_with_peft_and_gives_the_same_losses(name, family, tmp_path):
    if name == "all biases" and family != "llama":
        pytest.skip("refused, see below")
    spec = backbone(family)
    tenant, _ = make(spec, name, family, tmp_path, [5, 9], None)
    save_adapter(tmp_path / "saved", tenant.adapter, like=tenant.folder)
    loaded = PeftModel.from_pretrained(random_weights(spec), tmp_path / "saved").eval()
    losses, _ = together(spec, [tenant], random_weights(spec), 1)
    torch.testing.assert_close(solo_losses(loaded, tenant.examples), losses[0, 0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("backbone_name", "tp"), [("llama", 2), ("llama-one-kv", 4), ("gpt2", 2)])
def test_shards_equal_the_whole(backbone_name, tp, tmp_path):
    """Losses, gradients and tensors of two steps: norms are those of whole rows, biases are added once."""
    spec = SPECS[backbone_name].model_copy(update={"layers": 2})
    names = [name for name in VARIANTS if name != "all biases" or spec.rms_norm]
    made = [make(spec, name, spec.family, tmp_path, [5, 4], None)[0] for name in names]
    weights = random_weights(spec)
    whole = play(spec, made, Shard(), weights)
    ranks = ThreadTeam(tp).run(lambda shard: play(spec, made, shard, weights))
    for i, name in enumerate(names):
        expected_losses, expected = whole
        for losses, _ in ranks:
            torch.testing.assert_close(losses[:, i], expected_losses[:, i], rtol=1e-10, atol=1e-10, msg=name)
        found = assemble([own[i] for _, own in ranks])
        assert found.keys() == expected[i].keys()
        for key, (_, value) in expected[i].items():
            torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-9, msg=f"{name}: {key}")
            for _, own in ranks:
                portion, part = own[i][key]
                assert torch.equal(portion.take(found[key]), part), f"{name}: {key} differs between holders"


def play(spec, tenants, shard, weights):
    """Losses of two steps, and the tensors behind them, of one rank."""
    stage = Stage(spec, range(spec.layers), first=True, last=True, weights=weights, shard=shard)
    trained = []
    for tenant in tenants:
        stage.add_task(tenant.task, tenant.adapter)
        name = tenant.task.id
        own = stage.task_parameters(name), stage.task_portions(name)
        trained.append(Tenant(tenant.task, *own, changed=lambda name=name: stage.renew(name)))
    losses = []
    for step in range(2):
        batch = build_microbatch(
            lay_out(tenants, "pack"),
            [t.examples for t in tenants],
            task_ids=[t.task.id for t in tenants],
            dropout_seeds={i: t.task.seed for i, t in enumerate(tenants) if t.task.peft.dropout},
            step=step,
        )
        losses_K = stage.forward(batch, None)
        losses_K.sum().backward()
        losses.append(losses_K.detach())
        if shard.team is not None:
            sum_over_shards(trained, shard.team)
        for tenant in trained:
            tenant.step(step, 0.0)
    return torch.stack(losses), [
        {key: (t.portions[key], p.detach()) for key, p in t.parameters.items()} for t in trained
    ]


def test_restored_norms_are_those_of_the_restored_factors(tmp_path):
    spec = backbone("llama")
    tenant, _ = make(spec, "dora", "llama", tmp_path, [6, 4], None)
    weights = random_weights(spec)
    moved, _ = together(spec, [tenant], weights, 3)
    stage = Stage(spec, range(spec.layers), first=True, last=True, weights=weights)
    zeros = {key: torch.zeros_like(value) for key, value in tenant.adapter.items()}
    stage.add_task(tenant.task, zeros)
    name = tenant.task.id
    trained = Tenant(
        tenant.task,
        stage.task_parameters(name),
        stage.task_portions(name),
        changed=lambda: stage.renew(name),
    )
    trained.restore({"adapter": dict(tenant.adapter), "optimizer": {}})
    batch = build_microbatch(lay_out([tenant], "pack"), [tenant.examples], task_ids=[name])
    torch.testing.assert_close(stage.forward(batch, None).detach(), moved[0], rtol=1e-12, atol=1e-12)
