"""Prefix and prompt tuning beside LoRA on a whole stage, against peft's own models."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from peft import (
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
)

from muxtune.batches import HTaskShape, layout_step
from muxtune.peft import EMBEDDING, attachments, check_peft, extra
from muxtune.peft.prefix_tuning import PrefixTuningSpec
from muxtune.peft.prompt_tuning import PromptTuningSpec
from muxtune.support.errors import SpecError
from muxtune.tasks import TaskData
from runtime.attention import BACKENDS
from runtime.attention.carried_kv import CarriedKv
from runtime.backbone.hugging_face import load_hf_model
from runtime.backbone.stage import Stage
from runtime.data.batch import build_microbatch
from runtime.distributed.sharding import Shard, assemble
from runtime.reports.solo import train_solo
from runtime.tasks.adapter_files import initial_adapter, load_adapter, save_adapter
from runtime.tasks.optimizer import build_optimizer
from tests.runtime.attention.stand_ins import let_every_backend_run
from tests.runtime.backbone.test_sharded_stage import ThreadTeam, gradients, random_weights
from tests.runtime.backbone.test_sharded_stage import play as play_shard
from tests.runtime.worlds import BACKBONES, Tenant, make_task, make_tenant, solo_losses

P = 5
PREFIX = PrefixTuningSpec(method="prefix_tuning", num_virtual_tokens=P)
PROMPT = PromptTuningSpec(method="prompt_tuning", num_virtual_tokens=P)
CONFIGS = {"prefix_tuning": PrefixTuningConfig, "prompt_tuning": PromptTuningConfig}
KEY = "prompt_embeddings"

# Which tenants, and the rows of their sequences without virtual tokens
MIXED = (("prefix", PREFIX, [7, 20]), ("lora", None, [9, 4]), ("prompt", PROMPT, [11, 3, 26]))


def short(spec):
    return spec.model_copy(update={"layers": 2})


def make_tenants(spec, folder, chosen=MIXED):
    tenants = []
    for number, (name, peft, lengths) in enumerate(chosen):
        task = make_task(name, r=3, seed=number)
        task = task if peft is None else task.model_copy(update={"peft": peft})
        tenants.append(make_tenant(spec, task, lengths, folder / name))
    return tenants


def batches_of(tenants, alignment, *, backend="grouped", carry=1, chunk=16):
    """All sequences of all tenants in one micro-batch, or in one carry group."""
    extras = [extra(t.task.peft) for t in tenants]
    rows = [
        np.array([each.rows + len(e.tokens) for e in t.examples])
        for each, t in zip(extras, tenants, strict=True)
    ]
    row = {"pad": max(int(each.max()) for each in rows) + 2, "pack": None, "chunk": chunk}[alignment]
    tokens = {"pack": sum(int(each.sum()) for each in rows), "chunk": 64 * row if row else 0}.get(
        alignment, (row or 0) * sum(map(len, rows))
    )
    shape = HTaskShape(
        alignment=alignment, row_tokens=row, microbatches=carry, tokens=tokens // carry, carry=carry
    )
    layouts = layout_step(shape, rows)
    carried = CarriedKv() if carry > 1 else None
    return [
        build_microbatch(
            layout,
            [t.examples for t in tenants],
            task_ids=[t.task.id for t in tenants],
            attention=backend,
            carried=carried,
            earlier=layouts[:number],
            extras=extras,
        )
        for number, layout in enumerate(layouts)
    ]


def play(spec, tenants, batches, stages=1):
    """Sums of losses by task, and the stages with the gradients of their tensors."""
    bounds = np.linspace(0, spec.layers, stages + 1).astype(int)
    weights = load_hf_model(spec)
    built = [
        Stage(
            spec,
            range(bounds[i], bounds[i + 1]),
            first=i == 0,
            last=i == stages - 1,
            weights=weights,
        )
        for i in range(stages)
    ]
    for tenant in tenants:
        for stage in built:
            stage.add_task(tenant.task, tenant.adapter)
    outputs = []
    for batch in batches:
        hidden = None
        for stage in built:
            hidden = stage.forward(batch, hidden)
        outputs.append(hidden)
    for output in reversed(outputs):
        output.sum().backward()
    return torch.stack([output.detach() for output in outputs]).sum(0), built


def pefts_own(spec, tenant):
    """Peft's own model with the tenant's adapter."""
    peft = tenant.task.peft
    if peft.method not in CONFIGS:
        return PeftModel.from_pretrained(load_hf_model(spec), tenant.folder, is_trainable=True)
    config = CONFIGS[peft.method](task_type="CAUSAL_LM", num_virtual_tokens=peft.num_virtual_tokens)
    model = get_peft_model(load_hf_model(spec), config)
    (encoder,) = model.prompt_encoder.values()
    encoder.double()
    with torch.no_grad():
        encoder.embedding.weight.copy_(tenant.adapter[KEY])
    return model.eval()


class Behind(torch.nn.Module):
    """A model whose logits begin with the first token of the examples."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        output = self.model(input_ids=input_ids)
        output.logits = output.logits[:, -input_ids.shape[1] :]
        return output


def assert_equals_peft(spec, tenants, batches, **how):
    losses_K, stages = play(spec, tenants, batches, **how)
    for number, tenant in enumerate(tenants):
        if tenant.task.peft.method not in CONFIGS:
            continue
        model = pefts_own(spec, tenant)
        expected = solo_losses(Behind(model), tenant.examples)
        torch.testing.assert_close(losses_K[number], expected.detach(), rtol=1e-9, atol=1e-9)
        expected.backward()
        (encoder,) = model.prompt_encoder.values()
        found = assemble(
            {
                key: (stage.task_portions(tenant.task.id)[key], parameter.grad)
                for key, parameter in stage.task_parameters(tenant.task.id).items()
            }
            for stage in stages
        )
        torch.testing.assert_close(found[KEY], encoder.embedding.weight.grad, rtol=1e-7, atol=1e-9)
    return losses_K


@pytest.mark.parametrize("family", BACKBONES)
@pytest.mark.parametrize("alignment", ["pad", "pack", "chunk"])
def test_mixed_with_lora_they_equal_peft(family, alignment, tmp_path):
    spec = short(BACKBONES[family])
    tenants = make_tenants(spec, tmp_path)
    losses_K = assert_equals_peft(spec, tenants, batches_of(tenants, alignment), stages=2)
    alone, _ = play(spec, tenants[1:2], batches_of(tenants[1:2], alignment))
    torch.testing.assert_close(losses_K[1:2], alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", sorted(BACKENDS))
@pytest.mark.parametrize(("alignment", "carry"), [("pad", 1), ("chunk", 4)])
def test_every_attention_backend_reads_the_prefix(backend, alignment, carry, tmp_path, monkeypatch):
    let_every_backend_run(monkeypatch)
    spec = short(BACKBONES["llama"])
    tenants = make_tenants(spec, tmp_path)
    batches = batches_of(tenants, alignment, backend=backend, carry=carry, chunk=8)
    assert_equals_peft(spec, tenants, batches)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_they_go_through_carry_groups(family, tmp_path):
    spec = short(BACKBONES[family])
    tenants = make_tenants(spec, tmp_path)
    assert_equals_peft(spec, tenants, batches_of(tenants, "chunk", carry=4, chunk=4), stages=2)


def test_padded_rows_may_end_behind_the_last_position(tmp_path):
    """Rows as long as a neighbour may have sequences are those of a task with a prefix as well."""
    for family in BACKBONES:
        spec = short(BACKBONES[family]).model_copy(update={"max_positions": 40})
        chosen = (("prefix", PREFIX, [40 - P]), ("lora", None, [38]))
        tenants = make_tenants(spec, tmp_path / family, chosen)
        assert_equals_peft(spec, tenants, batches_of(tenants, "pad"))


@pytest.mark.parametrize("tp", [2, 4])
def test_ranks_cut_the_prefix_by_heads_and_have_the_prompt_whole(tp, tmp_path):
    spec = short(BACKBONES["llama"])  # 4 heads, 2 of keys and values
    tenants = make_tenants(spec, tmp_path)
    (batch,) = batches_of(tenants, "pack")
    weights = random_weights(spec)
    expected_K, whole, _ = play_shard(spec, tenants, batch, weights, Shard())
    ranks = ThreadTeam(tp).run(lambda shard: play_shard(spec, tenants, batch, weights, shard))
    for losses_K, _, _ in ranks:
        torch.testing.assert_close(losses_K, expected_K, rtol=1e-9, atol=1e-9)
    for i, tenant in enumerate(whole):
        found, expected = assemble([gradients(own[i]) for _, own, _ in ranks]), assemble([gradients(tenant)])
        for key, gradient in expected.items():
            torch.testing.assert_close(found[key], gradient, rtol=1e-7, atol=1e-9)


def test_later_stages_have_no_tensor_of_a_prompt(tmp_path):
    spec = short(BACKBONES["llama"])
    tenants = make_tenants(spec, tmp_path)
    _, (first, last) = play(spec, tenants, batches_of(tenants, "pack"), stages=2)
    assert (len(first.task_parameters("prompt")), len(last.task_parameters("prompt"))) == (1, 0)
    assert list(first.task_parameters("prefix")) == [f"{KEY}@0"]


@pytest.mark.parametrize("peft", [PREFIX, PROMPT], ids=lambda each: each.method)
@pytest.mark.parametrize("family", BACKBONES)
def test_twenty_steps_equal_the_solo_run(family, peft, tmp_path):
    spec = short(BACKBONES[family])
    task = make_task("a", steps=20, seed=7).model_copy(update={"peft": peft})
    initial_adapter(spec, task, tmp_path)
    adapter = load_adapter(tmp_path)
    tenant = make_tenant(spec, task, [6, 13, 9, 20], tmp_path)
    tenant = Tenant(task, tenant.examples, adapter, tenant.folder)
    expected = train_solo(spec, TaskData(task, tenant.examples), task.steps)
    assert torch.equal(expected.initial_adapter[KEY], adapter[KEY])
    batches = batches_of([tenant], "pack")
    stage = Stage(spec, range(spec.layers), first=True, last=True, weights=load_hf_model(spec))
    stage.add_task(task, adapter)
    parameters = stage.task_parameters("a")
    optimizer = build_optimizer(list(parameters.values()), task)
    targets = sum(example.target_tokens for example in tenant.examples)
    for loss in expected.losses:
        (own,) = stage.forward(batches[0], None) / targets
        assert float(own.detach()) == pytest.approx(loss, rel=1e-9)
        own.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = assemble([{key: (stage.task_portions("a")[key], p.detach()) for key, p in parameters.items()}])
    torch.testing.assert_close(trained[KEY], expected.adapter[KEY], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("peft", [PREFIX, PROMPT], ids=lambda each: each.method)
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_the_initial_adapter_is_what_peft_draws(peft, dtype, tmp_path):
    spec = short(BACKBONES["llama"]).model_copy(update={"dtype": dtype})
    task = make_task("t", seed=11).model_copy(update={"peft": peft})
    initial_adapter(spec, task, tmp_path)
    model = load_hf_model(spec)
    torch.manual_seed(11)
    config = CONFIGS[peft.method](task_type="CAUSAL_LM", num_virtual_tokens=P)
    (theirs,) = get_peft_model_state_dict(get_peft_model(model, config)).values()
    ours = load_adapter(tmp_path)
    assert ours.keys() == {KEY}
    assert ours[KEY].dtype == (torch.float64 if dtype == "float64" else torch.float32)
    assert torch.equal(ours[KEY].float(), theirs)


@pytest.mark.parametrize("peft", [PREFIX, PROMPT], ids=lambda each: each.method)
@pytest.mark.parametrize("family", BACKBONES)
def test_what_is_saved_loads_with_peft_and_has_the_same_logits(family, peft, tmp_path):
    spec = short(BACKBONES[family]).model_copy(update={"dtype": "float32"})
    task = make_task("a", seed=3).model_copy(update={"peft": peft})
    tenant = make_tenant(spec, task, [6, 13], tmp_path / "init")
    save_adapter(tmp_path / "adapter", tenant.adapter, like=tmp_path / "init")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["num_virtual_tokens"], config["task_type"]) == (P, "CAUSAL_LM")
    assert config["base_model_name_or_path"] == spec.name
    loaded = PeftModel.from_pretrained(load_hf_model(spec), tmp_path / "adapter").eval()
    expected = solo_losses(Behind(loaded), tenant.examples)
    losses_K, _ = play(spec, [tenant], batches_of([tenant], "pack"))
    torch.testing.assert_close(losses_K[0], expected.detach(), rtol=1e-5, atol=1e-5, check_dtype=False)


@pytest.mark.parametrize("peft", [PREFIX, PROMPT], ids=lambda each: each.method)
def test_a_task_starts_from_what_peft_has_saved(peft, tmp_path):
    spec = short(BACKBONES["llama"])
    config = CONFIGS[peft.method](task_type="CAUSAL_LM", num_virtual_tokens=P)
    saved = get_peft_model(load_hf_model(spec), config)
    saved.save_pretrained(tmp_path / "saved")
    own = peft.model_copy(update={"init": tmp_path / "saved"})
    check_peft(own, spec, "peft")
    task = make_task("a", seed=3).model_copy(update={"peft": own})
    initial_adapter(spec, task, tmp_path / "init")
    (theirs,) = get_peft_model_state_dict(saved).values()
    assert torch.equal(load_adapter(tmp_path / "init")[KEY].float(), theirs)
    more = own.model_copy(update={"num_virtual_tokens": P + 1})
    with pytest.raises(SpecError, match=r"peft\.init = .* an adapter with num_virtual_tokens 6 .* not 5"):
        check_peft(more, spec, "peft")


def test_a_bfloat16_backbone_keeps_float32_virtual_tokens(tmp_path):
    spec = short(BACKBONES["llama"]).model_copy(update={"dtype": "bfloat16"})
    tenants = make_tenants(spec, tmp_path)
    _, (stage,) = play(spec, tenants, batches_of(tenants, "pack"))
    for task_id in ("prefix", "prompt"):
        for parameter in stage.task_parameters(task_id).values():
            assert parameter.dtype == parameter.grad.dtype == torch.float32


def test_places_in_the_backbone():
    spec = BACKBONES["llama"]
    (prefix,) = attachments(PREFIX, spec, 1)
    assert attachments(PREFIX, spec, EMBEDDING) == () == attachments(PROMPT, spec, 1)
    (prompt,) = attachments(PROMPT, spec, EMBEDDING)
    assert (prefix.parameters, prompt.parameters) == (P * 2 * 2 * 8, P * 24)
