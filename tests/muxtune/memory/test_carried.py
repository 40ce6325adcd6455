"""What micro-batches of a carry group leave to each other, reckoned by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from muxtune.memory import Sharding, carried_gradient_bytes, carried_kv_bytes, kept_bytes
from muxtune.model import PRESETS
from tests.muxtune.memory.examples import make_work

LLAMA = PRESETS["llama-tiny"]
PER_TOKEN = 3 * 2 * 4 * 32 * 4
"""Three layers; keys and values of four heads of 32, float32."""

LEAVES = replace(make_work(tokens=128, length=128), left_tokens=128)


@pytest.mark.parametrize("tokens", [0, 128, 7 * 128])
def test_keys_and_values_are_left(tokens):
    assert carried_kv_bytes(LLAMA, 3, tokens=tokens) == tokens * PER_TOKEN
    assert carried_kv_bytes(LLAMA, 3, tokens=tokens, sharding=Sharding(tp=2)) == tokens * PER_TOKEN // 2


@pytest.mark.parametrize(
    ("calls", "slots"),
    [
        ([(1.0, 2, 64, 192)], 2 * 64),  # views into the gradient of all keys
        ([(1.0, 1, 64, 192), (1.0, 1, 64, 128)], 0),  # summed aside
    ],
)
def test_gradients_come_with_the_own_rows_of_a_single_call(calls, slots):
    reads = replace(make_work(tokens=128), attention=(), carried_attention=tuple(calls))
    works = (LEAVES, LEAVES, reads)
    assert carried_gradient_bytes(LLAMA, 3, works=works) == (128 + 128 + slots) * PER_TOKEN
    # Behind the last that reads, a micro-batch without carried sequences changes nothing.
    works = (LEAVES, LEAVES, reads, make_work(tokens=128))
    assert carried_gradient_bytes(LLAMA, 3, works=works) == (128 + 128 + slots) * PER_TOKEN


def test_nothing_is_left_where_every_sequence_lies_in_one_micro_batch():
    assert carried_gradient_bytes(LLAMA, 3, works=(make_work(),)) == 0


def test_attention_to_carried_keys_keeps_its_result_twice():
    """Under a mask it comes in another order than the stream, and the next linear reads a copy."""

    def kept(work):
        return kept_bytes(LLAMA, 1, first=False, last=True, work=work).activation_bytes

    causal = make_work(tokens=128, length=128)
    masked = replace(causal, attention=(), carried_attention=((1.0, 1, 128, 128),))
    mask, gathered, copy = 128 * 128 * 4, 128 * 2 * 128 * 4, 128 * 256 * 4
    assert kept(masked) - kept(causal) == mask + gathered + copy
