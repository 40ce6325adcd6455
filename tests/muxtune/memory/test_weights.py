"""What a rank holds whatever it computes."""

from __future__ import annotations

import pytest

from muxtune.memory import Sharding, adapter_parameters, backbone_bytes, table_bytes
from muxtune.model import PRESETS
from muxtune.peft.lora import LoraSpec
from muxtune.support.errors import SpecError

LLAMA, GPT2 = PRESETS["llama-tiny"], PRESETS["gpt2-tiny"]
ALL = LoraSpec(method="lora", r=8, alpha=8, targets=("all-linear",))


@pytest.mark.parametrize("name", ["llama-tiny", "gpt2-tiny", "opt-tiny", "gpt3-2.7b", "llama2-7b", "opt-30b"])
def test_the_stages_of_a_pipeline_hold_the_whole_model_and_tied_embeddings_twice(name):
    model = PRESETS[name]
    halves = [model.layers // 2, model.layers - model.layers // 2]
    held = sum(
        backbone_bytes(model, layers, first=stage == 0, last=stage == 1)
        for stage, layers in enumerate(halves)
    )
    twice = model.vocab * model.hidden * model.tied_embeddings
    assert held == (model.parameters + twice) * model.dtype_bytes


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("model", [LLAMA, GPT2], ids=str)
def test_ranks_hold_equal_shares_of_the_linears_and_all_of_norms_and_biases(model, tp):
    linears = sum(linear.in_features * linear.out_features for linear in model.linears)
    whole = backbone_bytes(model, 3, first=False, last=False)
    shard = backbone_bytes(model, 3, first=False, last=False, sharding=Sharding(tp=tp))
    assert whole - shard == 3 * (linears - linears // tp) * model.dtype_bytes


def test_embedding_and_head_are_split_by_the_vocabulary():
    ends = {
        tp: backbone_bytes(LLAMA, 1, first=True, last=True, sharding=Sharding(tp=tp))
        - backbone_bytes(LLAMA, 1, first=False, last=False, sharding=Sharding(tp=tp))
        for tp in (1, 2)
    }
    assert ends[1] - ends[2] == LLAMA.vocab * LLAMA.hidden * LLAMA.dtype_bytes  # half of two tables


def test_heads_of_keys_that_are_fewer_than_ranks_are_repeated():
    sharding = Sharding(tp=8)  # eight query heads, four of keys and values
    assert sharding.query_width(LLAMA) == LLAMA.head_dim
    assert sharding.kv_width(LLAMA) == LLAMA.head_dim


def test_heads_that_cannot_be_dealt_out_are_refused():
    with pytest.raises(
        SpecError, match=r"parallelism\.tp = 3: expected a divisor of 8, the heads of llama-tiny"
    ):
        Sharding(tp=3).check(LLAMA)


def test_one_factor_of_a_low_rank_pair_is_split_with_its_linear():
    # gpt2-tiny, hidden 256, MLP 1024; by hand per layer, rank 8, on two ranks:
    split = 8 * (
        (256 + 3 * 256 // 2)  # c_attn: A whole, half of B
        + (256 // 2 + 256)  # c_proj of the attention: half of A, B whole
        + (256 + 1024 // 2)  # c_fc
        + (1024 // 2 + 256)  # c_proj of the MLP
    )
    assert adapter_parameters(GPT2, 5, ALL, Sharding(tp=2)) == 5 * split
    assert adapter_parameters(GPT2, 5, ALL) == 5 * 8 * (4 * 256 + 2 * 256 + 2 * (256 + 1024))


def test_only_rotary_positions_need_tables():
    assert table_bytes(GPT2) == 0
    assert table_bytes(LLAMA) == 3 * 1024 * 32 * 4
