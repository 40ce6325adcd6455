"""Which layers are alike, and where the backward of the first stage ends."""

from __future__ import annotations

from muxtune.model import PRESETS
from muxtune.peft import attachments
from muxtune.peft.layers import (
    alike_layers,
    backward_layers,
    count_layers,
    layer_classes,
    runs_of,
    stage_attachments,
    stages_layers,
)
from muxtune.peft.lora import LoraSpec
from muxtune.peft.prompt_tuning import PromptTuningSpec
from muxtune.peft.sites import EMBEDDING

LLAMA = PRESETS["llama-tiny"]  # eight layers
PROMPT = PromptTuningSpec(method="prompt_tuning", num_virtual_tokens=4)


def lora(*layers: int) -> LoraSpec:
    """Queries of some layers, or of all."""
    return LoraSpec(method="lora", r=4, alpha=8, targets=("q_proj",), layers=layers or None)


def test_a_number_stands_for_layers_like_the_first():
    assert runs_of(3) == ((0, 3),)
    assert (count_layers(3), count_layers(((0, 2), (2, 28)))) == (3, 30)


def test_layers_are_like_the_first_with_the_same_attachments():
    assert alike_layers(LLAMA, lora()) == (0,) * 8
    assert alike_layers(LLAMA, lora(2, 3, 6)) == (0, 0, 2, 2, 0, 0, 2, 0)
    assert layer_classes(LLAMA, (lora(2, 3, 6), lora(3))) == (0, 0, 2, 3, 0, 0, 2, 0)
    assert layer_classes(LLAMA, (lora(), PROMPT)) == (0,) * 8


def test_stages_have_runs_of_layers_that_are_alike():
    assert stages_layers(LLAMA, (lora(2, 3),), (3, 5)) == [((0, 2), (2, 1)), ((2, 1), (0, 4))]


def test_an_attachment_comes_as_often_as_its_layer():
    (query,) = attachments(lora(2), LLAMA, 2)
    assert stage_attachments(LLAMA, ((0, 2), (2, 3)), lora(2), first=True) == [(query, 3)]
    (prompt,) = stage_attachments(LLAMA, 4, PROMPT, first=True)
    assert prompt[1] == 1
    assert stage_attachments(LLAMA, 4, PROMPT, first=False) == []


def test_the_backward_of_the_first_stage_ends_in_the_first_trained_layer():
    layers = ((0, 2), (2, 2), (0, 4))
    (query,) = attachments(lora(2, 3), LLAMA, 2)
    assert backward_layers(LLAMA, (lora(2, 3),), layers, first=True) == (
        ((2, 1), (0, 4)),
        (2, 1),
        query.depth,
    )
    assert backward_layers(LLAMA, (lora(2, 3),), layers, first=False) == (layers, None, EMBEDDING)


def test_with_a_trained_embedding_it_ends_there_and_without_anything_trained_there_is_none():
    layers = ((0, 4),)
    assert backward_layers(LLAMA, (lora(6), PROMPT), layers, first=True) == (layers, None, EMBEDDING)
    assert backward_layers(LLAMA, (lora(6),), layers, first=True) == ((), None, EMBEDDING)
