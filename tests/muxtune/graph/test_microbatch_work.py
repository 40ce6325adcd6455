"""What a micro-batch puts through the backbone, counted by hand."""

from __future__ import annotations

import pytest

from tests.muxtune.graph.works import lora, work


def test_sequences_are_those_that_begin_here_and_those_that_go_on():
    begun = work(lora("q_proj"), attention=((0.75, 2, 64), (1.5, 3, 16)))
    assert begun.sequences == 0.75 * 2 + 1.5 * 3
    going_on = work(lora("q_proj"), attention=(), carried_attention=((2.0, 4, 16, 48),))
    assert going_on.sequences == 8


def test_every_task_has_a_span():
    with pytest.raises(AssertionError):
        work(lora("q_proj"), lora("v_proj"), task_tokens=(200,))
