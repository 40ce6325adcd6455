"""The stages against transformers and peft; everything else in this room builds on this equality."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from muxtune.model import PRESETS, load_model_spec
from muxtune.support.errors import SpecError
from runtime.backbone.held_bytes import parameter_bytes
from runtime.backbone.hugging_face import hf_config, load_hf_model
from runtime.backbone.stage import Stage
from runtime.data.batch import build_microbatch
from runtime.device.allocations import SavedBytes
from runtime.tasks.adapter_files import save_adapter
from tests.helpers import TINY_PRESETS
from tests.runtime.worlds import BACKBONES, lay_out, make_task, make_tenant, solo_losses

TARGETS = {
    "llama": ("q_proj", "v_proj", "down_proj"),
    "gpt2": ("c_attn", "mlp.c_proj"),
    "opt": ("q_proj", "v_proj", "fc1"),
}
MODELS = {"llama": LlamaForCausalLM, "gpt2": GPT2LMHeadModel, "opt": OPTForCausalLM}


@pytest.fixture(params=BACKBONES)
def backbone(request):
    return BACKBONES[request.param]


def make_tenants(spec, tmp_path):
    tasks = [
        (make_task("a", r=1), [3, 17, 5, 5]),
        (make_task("b", r=3, targets=TARGETS[spec.family]), [30, 29, 2]),
        (make_task("c", r=8), [9]),
    ]
    return [make_tenant(spec, task, lengths, tmp_path / task.id) for task, lengths in tasks]


def make_stages(spec, tenants, split=(0, 3)):
    weights = load_hf_model(spec)
    bounds = [*split, spec.layers]
    stages = [
        Stage(spec, range(a, b), first=a == 0, last=b == spec.layers, weights=weights)
        for a, b in pairwise(bounds)
    ]
    for stage in stages:
        for tenant in tenants:
            stage.add_task(tenant.task, tenant.adapter)
    return stages


def run_stages(stages, batch, weights_K):
    """Forward and backward through all stages as ranks would do it, with cut graphs."""
    hidden, ends = None, []
    for stage in stages:
        if hidden is not None:
            hidden = hidden.detach().requires_grad_()
        output = stage.forward(batch, hidden)
        ends.append((hidden, output))
        hidden = output
    losses_K, gradient = hidden, weights_K
    for entry, output in reversed(ends):
        torch.autograd.backward(output, gradient)
        gradient = None if entry is None else entry.grad
    return losses_K.detach()


@pytest.mark.parametrize("alignment", ["pad", "pack", "chunk"])
def test_two_stages_of_three_tasks_equal_three_solo_runs_of_peft(backbone, alignment, tmp_path):
    tenants = make_tenants(backbone, tmp_path)
    stages = make_stages(backbone, tenants)
    layout = lay_out(tenants, alignment)
    batch = build_microbatch(layout, [t.examples for t in tenants], task_ids=[t.task.id for t in tenants])
    factors_K = torch.tensor([0.3, 1.0, 2.0], dtype=torch.float64)
    losses_K = run_stages(stages, batch, factors_K)
    for i, tenant in enumerate(tenants):
        save_adapter(tmp_path / "solo", tenant.adapter, like=tenant.folder)
        solo = PeftModel.from_pretrained(load_hf_model(backbone), tmp_path / "solo", is_trainable=True).eval()
        loss = solo_losses(solo, tenant.examples)
        assert losses_K[i].item() == pytest.approx(loss.item(), rel=1e-9)
        (factors_K[i] * loss).backward()
        ours = stages[0].task_parameters(tenant.task.id) | stages[1].task_parameters(tenant.task.id)
        theirs = {n.replace(".default", ""): p for n, p in solo.named_parameters() if p.requires_grad}
        assert ours.keys() == theirs.keys() == tenant.adapter.keys()
        for key, parameter in theirs.items():
            # Llama's norms work in float32 even here, but in the very same operations.
            torch.testing.assert_close(ours[key].grad, parameter.grad, rtol=1e-9, atol=1e-9)


def test_float32_equals_peft_up_to_rounding(backbone, tmp_path):
    spec = backbone.model_copy(update={"dtype": "float32"})
    tenants = make_tenants(spec, tmp_path)
    stages = make_stages(spec, tenants)
    batch = build_microbatch(
        lay_out(tenants, "pack"), [t.examples for t in tenants], task_ids=[t.task.id for t in tenants]
    )
    losses_K = run_stages(stages, batch, torch.ones(3))
    for i, tenant in enumerate(tenants):
        save_adapter(tmp_path / "solo", tenant.adapter, like=tenant.folder)
        solo = PeftModel.from_pretrained(load_hf_model(spec), tmp_path / "solo").eval()
        assert losses_K[i].item() == pytest.approx(solo_losses(solo, tenant.examples).item(), rel=1e-5)


def test_bfloat16_computes_its_loss_in_float32(backbone, tmp_path):
    spec = backbone.model_copy(update={"dtype": "bfloat16"})
    tenants = make_tenants(spec, tmp_path)
    (stage,) = make_stages(spec, tenants, split=(0,))
    batch = build_microbatch(
        lay_out(tenants, "pad"), [t.examples for t in tenants], task_ids=[t.task.id for t in tenants]
    )
    losses_K = stage.forward(batch, None)
    assert losses_K.dtype == torch.float32
    losses_K.sum().backward()
    for i, tenant in enumerate(tenants):
        save_adapter(tmp_path / "solo", tenant.adapter, like=tenant.folder)
        solo = PeftModel.from_pretrained(load_hf_model(spec), tmp_path / "solo").eval()
        with torch.no_grad():
            expected = solo_losses(solo, tenant.examples).item()
        assert losses_K[i].item() == pytest.approx(expected, rel=0.01)  # bfloat16 has 8 bits


def test_the_frozen_shard_is_split_over_the_stages_and_does_not_grow_with_tasks(backbone, tmp_path):
    tenants = make_tenants(backbone, tmp_path)
    stages = make_stages(backbone, tenants, split=(0, 1))
    layer = backbone.layer_parameters
    assert parameter_bytes(stages[0]) == 8 * (layer + backbone.embedding_parameters)
    assert parameter_bytes(stages[1]) == 8 * (3 * layer + backbone.head_parameters)
    assert not any(p.requires_grad for stage in stages for p in stage.parameters())


def test_adapters_and_weights_are_not_counted_as_saved(backbone, tmp_path):
    tenants = make_tenants(backbone, tmp_path)
    (stage,) = make_stages(backbone, tenants, split=(0,))
    batch = build_microbatch(
        lay_out(tenants, "pack"), [t.examples for t in tenants], task_ids=[t.task.id for t in tenants]
    )
    with SavedBytes(stage) as saved:
        stage.forward(batch, None)
    weights = [*stage.parameters()]
    for tenant in tenants:
        weights += stage.task_parameters(tenant.task.id).values()
    assert saved.bytes > 0
    assert not {weight.data_ptr() for weight in weights} & saved._storages.keys()


def test_an_adapter_of_another_rank_is_refused_with_its_name(tmp_path):
    spec = BACKBONES["llama"]
    tenant = make_tenant(spec, make_task("a", r=2), [5], tmp_path)
    stage = Stage(spec, range(4), first=True, last=True, weights=load_hf_model(spec))
    with pytest.raises(SpecError, match=r"adapter of a: .*layers\.0\.self_attn\.q_proj\.lora_A.*\(3, 24\)"):
        stage.add_task(make_task("a", r=3), tenant.adapter)


@pytest.mark.parametrize("name", TINY_PRESETS)
def test_a_preset_is_the_model_that_transformers_draws_under_its_seed(name):
    spec = PRESETS[name]
    torch.manual_seed(4)
    state = torch.random.get_rng_state()
    ours = load_hf_model(spec)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(spec.init_seed)
    theirs = MODELS[spec.family](hf_config(spec))
    assert ours.num_parameters() == spec.parameters
    for (key, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.equal(a, b), key


def hf_directory(family, folder):
    torch.manual_seed(0)
    if family == "llama":
        rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0}
        rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
        config = LlamaConfig(
            vocab_size=40,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            rope_parameters=rope,
            tie_word_embeddings=True,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
    elif family == "opt":
        config = OPTConfig(
            vocab_size=40,
            max_position_embeddings=64,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            enable_bias=False,  # as Galactica's
            activation_function="gelu",
        )
        OPTForCausalLM(config).save_pretrained(folder)
    else:
        config = GPT2Config(vocab_size=40, n_positions=64, n_embd=32, n_layer=2, n_head=4)
        GPT2LMHeadModel(config).save_pretrained(folder)


@pytest.mark.parametrize("family", BACKBONES)
def test_a_hugging_face_directory_with_its_rope_scaling_and_dropouts_off(family, tmp_path):
    hf_directory(family, tmp_path / "model")
    spec = load_model_spec(str(tmp_path / "model"), "float64")
    tenant = make_tenant(spec, make_task("a"), [30, 12, 64], tmp_path / "a")
    (stage,) = make_stages(spec, [tenant], split=(0,))
    batch = build_microbatch(lay_out([tenant], "pack"), [tenant.examples], task_ids=["a"])
    save_adapter(tmp_path / "solo", tenant.adapter, like=tenant.folder)
    solo = PeftModel.from_pretrained(load_hf_model(spec), tmp_path / "solo").eval()
    expected = solo_losses(solo, tenant.examples).item()
    assert stage.forward(batch, None).item() == pytest.approx(expected, rel=1e-9)


def test_missing_unreadable_and_incomplete_weights_are_refused(tmp_path):
    hf_directory("llama", tmp_path)
    spec = load_model_spec(str(tmp_path))
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(SpecError, match=r"missing model\.layers\.1\.mlp\.up_proj\.weight"):
        load_hf_model(spec)
    file.write_bytes(b"nonsense")
    with pytest.raises(SpecError, match="expected a directory with readable weights"):
        load_hf_model(spec)
    file.unlink()
    with pytest.raises(SpecError, match="expected a directory with readable weights"):
        load_hf_model(spec)
