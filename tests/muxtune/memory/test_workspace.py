"""Temporaries reckoned by hand; tests/runtime/backbone/test_memory_model.py holds them against torch."""

from __future__ import annotations

import pytest

from muxtune.memory import Sharding, backward_workspace_bytes, forward_workspace_bytes
from muxtune.model import PRESETS
from tests.muxtune.memory.examples import make_work

NAMES = ("llama-tiny", "gpt2-tiny", "opt-tiny")  # 256 wide, 264 words, float32
TOKENS, TARGETS = 512, 100_000


@pytest.mark.parametrize("name", NAMES)
def test_with_many_targets_the_head_is_the_fullest_moment(name):
    model, work = PRESETS[name], make_work(tokens=TOKENS, targets=TARGETS)
    hidden, logits = TOKENS * 256 * 4, TARGETS * 264 * 4
    # Logits beside their log-probabilities, which are kept, and what the head reads; then two gradients.
    assert forward_workspace_bytes(model, last=True, work=work) == hidden + TARGETS * 256 * 4 + logits
    assert backward_workspace_bytes(model, last=True, work=work) == 2 * logits


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("workspace_bytes", [forward_workspace_bytes, backward_workspace_bytes])
def test_elsewhere_they_grow_with_the_tokens_and_no_rank_of_two_needs_more(name, workspace_bytes):
    model = PRESETS[name]

    one, two = (
        workspace_bytes(model, last=False, work=make_work(tokens=tokens)) for tokens in (TOKENS, 2 * TOKENS)
    )
    assert 0 < 2 * one == two
    shared = workspace_bytes(model, last=False, work=make_work(tokens=TOKENS), sharding=Sharding(tp=2))
    assert shared <= one


@pytest.mark.parametrize("tp", [1, 2])
def test_beside_the_output_of_relu_its_input_is_there_and_the_output_of_the_stage_not_yet(tp):
    work, sharding = make_work(tokens=TOKENS), Sharding(tp=tp)
    found = forward_workspace_bytes(PRESETS["opt-tiny"], last=False, work=work, sharding=sharding)
    assert found == TOKENS * (1024 // tp - 256) * 4
