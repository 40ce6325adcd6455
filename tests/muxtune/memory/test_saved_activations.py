"""What a micro-batch keeps, reckoned by hand.

What torch really keeps: tests/runtime/backbone/test_memory_model.py.
"""

from __future__ import annotations

from muxtune.memory import Sharding, forward_workspace_bytes, kept_bytes
from muxtune.memory.workspace import backward_workspace_bytes
from muxtune.model import PRESETS
from tests.muxtune.memory.examples import make_work

LLAMA, GPT2 = PRESETS["llama-tiny"], PRESETS["gpt2-tiny"]


def _middle(model, work, layers=1, **sharding):
    return kept_bytes(
        model, layers, first=False, last=False, work=work, sharding=Sharding(**sharding)
    ).total_bytes


def test_a_middle_layer_of_gpt2_by_hand():
    work = make_work(tokens=512, length=64, r=8)
    elements = (
        2 * (256 + 2)  # inputs and statistics of two norms
        + 2 * 256  # norms' outputs, for the adapters behind them
        + 4 * 256
        + 8  # queries, keys, values, result and log-sum-exp; the result is the next adapter's input
        + 2 * 1024  # argument and sigmoid of the activation
        + 1024  # its result, for the last adapter
        + 4 * 8  # what the first factors of four adapters gave
        + 256  # the stage's output
    )
    assert _middle(GPT2, work) == 512 * elements * 4


def test_tensor_parallelism_splits_attention_and_mlp_and_nothing_else():
    work = make_work(r=8)
    whole = _middle(LLAMA, work)
    tokens, b = 512, 4
    norms = (
        tokens * 2 * (256 + 1) * b + tokens * 2 * 256 * b + tokens * 256 * b
    )  # inputs, outputs, stage's output
    downs = tokens * 7 * 8 * b
    assert _middle(LLAMA, work, tp=2) == norms + downs + (whole - norms - downs) // 2


def test_logits_are_float32_beside_a_bfloat16_backbone_and_split_by_words():
    model = LLAMA.model_copy(update={"dtype": "bfloat16"})
    work = make_work(targets=10)
    logits = {
        tp: kept_bytes(model, 1, first=False, last=True, work=work, sharding=Sharding(tp=tp)).logit_bytes
        for tp in (1, 2)
    }
    assert logits == {1: 10 * 264 * 4, 2: 10 * 132 * 4}


def test_with_many_targets_the_backward_holds_two_gradients_of_the_logits():
    model = LLAMA.model_copy(update={"vocab": 50_000})
    work = make_work(tokens=512, targets=512)
    assert backward_workspace_bytes(model, last=True, work=work) == 2 * 512 * 50_000 * 4
    logits_beside_log_probabilities = 512 * 50_000 * 4 + 2 * 512 * 256 * 4
    assert forward_workspace_bytes(model, last=True, work=work) == logits_beside_log_probabilities


def test_casting_for_wider_adapters_costs_more_on_cpu_than_on_a_gpu():
    model = LLAMA.model_copy(update={"dtype": "bfloat16"})
    work = make_work()
    cpu, gpu = (backward_workspace_bytes(model, last=False, work=work, device=d) for d in ("cpu", "cuda"))
    # Three times the input's gradient; on a GPU the input and the output's gradient weigh more.
    assert cpu - gpu == 512 * (3 * 688 - (688 + 256)) * 4
    plain = make_work(adapted=("q_proj",))
    assert backward_workspace_bytes(model, last=False, work=plain) == 4 * 512 * 688 * 2
