"""Stages with dropout against peft with the same masks, and shards against whole stages."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel

from runtime.backbone.hugging_face import load_hf_model
from runtime.data.batch import build_microbatch
from runtime.distributed.sharding import Shard, assemble
from runtime.peft.lora_masks import MaskedReference
from runtime.tasks.adapter_files import save_adapter
from tests.integration.peft_dropout import PeftDropout
from tests.runtime.backbone.test_sharded_stage import SPECS, ThreadTeam, gradients, play, random_weights
from tests.runtime.backbone.test_stage import make_stages, run_stages
from tests.runtime.worlds import BACKBONES, lay_out, make_task, make_tenant, solo_losses

STEP = 7
RATES = {"a": 0.3, "b": 0.0, "c": 0.1}


def with_dropout(task_id, r):
    task = make_task(task_id, r=r)
    peft = task.peft.model_copy(update={"dropout": RATES[task_id]})
    return task.model_copy(update={"peft": peft})


def make_tenants(spec, folder):
    lengths = {"a": [3, 40, 5, 5], "b": [30, 29, 2], "c": [37]}
    tasks = [with_dropout(task_id, r) for task_id, r in (("a", 2), ("b", 3), ("c", 8))]
    return [make_tenant(spec, task, lengths[task.id], folder / task.id) for task in tasks]


def make_batch(tenants, alignment):
    return build_microbatch(
        lay_out(tenants, alignment, chunk_tokens=16),
        [t.examples for t in tenants],
        task_ids=[t.task.id for t in tenants],
        dropout_seeds={i: t.task.seed for i, t in enumerate(tenants) if t.task.peft.dropout},
        step=STEP,
    )


@pytest.mark.parametrize(
    ("family", "alignment"),
    [("llama", "pad"), ("llama", "pack"), ("llama", "chunk"), ("gpt2", "chunk"), ("opt", "pad")],
)
def test_two_stages_of_three_tasks_equal_three_solo_runs_of_peft(family, alignment, tmp_path):
    spec = BACKBONES[family]
    tenants = make_tenants(spec, tmp_path)
    stages = make_stages(spec, tenants)
    losses_K = run_stages(stages, make_batch(tenants, alignment), torch.ones(3, dtype=torch.float64))
    for i, tenant in enumerate(tenants):
        save_adapter(tmp_path / "solo", tenant.adapter, like=tenant.folder)
        solo = PeftModel.from_pretrained(load_hf_model(spec), tmp_path / "solo", is_trainable=True)
        assert solo.peft_config["default"].lora_dropout == RATES[tenant.task.id]
        masks = PeftDropout(solo.train(), rate=RATES[tenant.task.id], seed=tenant.task.seed)
        loss = torch.zeros((), dtype=torch.float64)
        for sequence, example in enumerate(tenant.examples):
            masks.place = (STEP, sequence)
            loss = loss + solo_losses(solo, [example])
        assert losses_K[i].item() == pytest.approx(loss.item(), rel=1e-9)
        loss.backward()
        ours = stages[0].task_parameters(tenant.task.id) | stages[1].task_parameters(tenant.task.id)
        theirs = {n.replace(".default", ""): p for n, p in solo.named_parameters() if p.requires_grad}
        for key, parameter in theirs.items():
            torch.testing.assert_close(ours[key].grad, parameter.grad, rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("family", BACKBONES)
def test_the_loop_of_validate_has_the_same_masks_in_a_padded_batch(family, tmp_path):
    spec = BACKBONES[family]
    tenant, *_ = make_tenants(spec, tmp_path)
    save_adapter(tmp_path / "solo", tenant.adapter, like=tenant.folder)
    ours, theirs = (PeftModel.from_pretrained(load_hf_model(spec), tmp_path / "solo") for _ in range(2))
    first, sequences = 1, tenant.examples[1:3]
    MaskedReference(ours, tenant.task).enter(STEP, first, [len(e.tokens) for e in sequences])
    masks = PeftDropout(theirs.train(), rate=RATES["a"], seed=tenant.task.seed)
    tokens = torch.zeros(2, len(sequences[0].tokens), dtype=torch.int64)
    attended = torch.zeros_like(tokens)
    for row, example in enumerate(sequences):
        tokens[row, : len(example.tokens)] = torch.from_numpy(example.tokens)
        attended[row, : len(example.tokens)] = 1
    padded = ours(input_ids=tokens, attention_mask=attended).logits
    for row, example in enumerate(sequences):
        masks.place = (STEP, first + row)
        alone = theirs(input_ids=torch.from_numpy(example.tokens)[None]).logits[0]
        torch.testing.assert_close(padded[row, : len(alone)], alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("name", "tp"), [("llama-odd", 2), ("llama", 4), ("gpt2", 2), ("opt", 2)], ids=str)
def test_shards_of_a_stage_equal_the_whole_stage(name, tp, tmp_path):
    spec = SPECS[name]
    tenants = make_tenants(spec, tmp_path)
    batch, weights = make_batch(tenants, "pack"), random_weights(spec)
    whole_losses_K, whole, _ = play(spec, tenants, batch, weights, Shard())
    ranks = ThreadTeam(tp).run(lambda shard: play(spec, tenants, batch, weights, shard))
    for losses_K, *_ in ranks:
        torch.testing.assert_close(losses_K, whole_losses_K, rtol=1e-12, atol=1e-12)
    for i, tenant in enumerate(whole):
        assembled = assemble([gradients(own[i]) for _, own, _ in ranks])
        for key, parameter in tenant.parameters.items():
            torch.testing.assert_close(assembled[key], parameter.grad, rtol=1e-7, atol=1e-9)


def test_tasks_without_dropout_do_not_notice_that_their_neighbours_have_it(tmp_path):
    spec = BACKBONES["llama"]
    tenants = make_tenants(spec, tmp_path)
    (stage,) = make_stages(spec, tenants, split=(0,))
    plain = [
        make_tenant(
            spec, make_task(t.task.id, r=t.task.peft.r), [len(e.tokens) for e in t.examples], t.folder
        )
        for t in tenants
    ]
    (without,) = make_stages(spec, plain, split=(0,))
    batch = make_batch(tenants, "pack")
    assert make_batch(plain, "pack").dropout_keys_T is None
    with torch.no_grad():
        first, second = stage.forward(batch, None), without.forward(make_batch(plain, "pack"), None)
    assert first[1] == second[1]
    assert (first != second).tolist() == [True, False, True]
