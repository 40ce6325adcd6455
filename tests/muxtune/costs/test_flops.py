"""Floating-point operations per token against torch's own counter, on transformers' and peft's models."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from muxtune.costs import MicrobatchWork, stage_operators
from muxtune.costs.flops import flops_per_token
from muxtune.costs.operator_work import operator_work
from muxtune.model import PRESETS
from muxtune.peft.lora import LoraSpec
from tests.muxtune.model.configs import hf_config

TOKENS = 256


def lora(*targets, r=8):
    return LoraSpec(method="lora", r=r, alpha=16, targets=targets)


def count(spec, adapter=None):
    """What torch counts per token in forward and backward of one sequence, on tensors without content.

    It counts matrix products, and the whole square of the scores: it does not see that half of it is masked.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config(spec), attn_implementation="eager")
        if adapter is not None:
            targets = "all-linear" if adapter.targets == ("all-linear",) else list(adapter.targets)
            config = LoraConfig(
                r=adapter.r,
                target_modules=targets,
                task_type="CAUSAL_LM",
                fan_in_fan_out=spec.transposed_weights,
            )
            model = get_peft_model(model, config)
        ids = torch.zeros(1, TOKENS, dtype=torch.long)
        mask = torch.zeros(1, 1, TOKENS, TOKENS)
        with FlopCounterMode(display=False) as forward:
            # Without mask and positions, transformers looks at the values of tensors that have none.
            logits = model(input_ids=ids, attention_mask=mask, position_ids=ids, use_cache=False).logits
        if adapter is None:
            return forward.get_total_flops() / TOKENS, 0.0
        with FlopCounterMode(display=False) as backward:
            logits.sum().backward()
    return forward.get_total_flops() / TOKENS, backward.get_total_flops() / TOKENS


@pytest.mark.parametrize("name", PRESETS)
def test_forward_is_what_torch_counts(name):
    spec = PRESETS[name]
    counted, _ = count(spec)
    assert flops_per_token(spec, "fwd", context_tokens=TOKENS).total == pytest.approx(counted, rel=1e-9)


@pytest.mark.parametrize(
    ("name", "targets", "rel"),
    [
        *((name, ("all-linear",), 1e-9) for name in PRESETS),
        ("gpt3-2.7b", ("c_attn",), 1e-9),
        # In the first layer, keys without an adapter have no gradient, which attention is charged for.
        ("llama2-7b", ("q_proj", "v_proj"), 1e-3),
        ("opt-30b", ("q_proj", "v_proj", "fc1"), 1e-3),
        # attention of the first layer has no gradient
        ("llama2-13b", ("o_proj", "down_proj"), 1e-9),
        ("llama3-8b", ("gate_proj",), 1e-9),
        ("gpt3-2.7b", ("c_proj",), 1e-9),
        ("opt-30b", ("fc2",), 1e-9),
    ],
)
def test_training_an_adapter_is_what_torch_counts_with_peft(name, targets, rel):
    spec, adapter = PRESETS[name], lora(*targets)
    forward, backward = count(spec, adapter)
    ours = {p: flops_per_token(spec, p, context_tokens=TOKENS, peft=adapter) for p in ("fwd", "bwd")}
    assert ours["fwd"].total == pytest.approx(forward, rel=1e-9)
    assert ours["bwd"].total == pytest.approx(backward, rel=rel)


def test_llama2_7b_forward_is_twice_its_weights_and_a_little_for_attention():
    spec = PRESETS["llama2-7b"]
    flops = flops_per_token(spec, "fwd", context_tokens=2048)
    assert flops.linears == 2 * 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    assert flops.attention == 32 * 4 * 2048 * 4096
    assert flops.head == 2 * 4096 * 32000
    assert flops.adapters == 0
    assert flops.total == flops.linears + flops.attention + flops.head


def test_only_targets_reach_the_head():
    spec = PRESETS["opt-tiny"]
    for phase in ("fwd", "bwd"):
        half = flops_per_token(spec, phase, context_tokens=1, peft=lora("fc1"), targets_per_token=0.5)
        assert half.head == spec.hidden * spec.vocab


def test_without_an_adapter_there_is_no_backward():
    assert flops_per_token(PRESETS["llama2-7b"], "bwd", context_tokens=100).total == 0


@pytest.mark.parametrize("name", PRESETS)
def test_the_operators_of_a_stage_add_up_to_the_same_work(name):
    spec, adapter, length = PRESETS[name], lora("all-linear"), 64
    work = MicrobatchWork(
        tokens=4 * length,
        task_tokens=(4 * length,),
        pefts=(adapter,),
        attention=((1.0, 4, length),),
        targets=20,
    )
    operators = stage_operators(spec, spec.layers, first=True, last=True, work=work, phase="fwd")
    products = [(op, n) for op, n in operators if op.kind in {"linear", "lora", "attention", "head"}]
    flops = flops_per_token(
        spec,
        "fwd",
        context_tokens=(length + 1) / 2,
        peft=adapter,
        targets_per_token=20 / work.tokens,
    )
    summed = sum(n * operator_work(op, "fwd", spec).flops for op, n in products)
    assert summed == pytest.approx(flops.total * work.tokens, rel=1e-12)
