"""Peaks of a stage's memory over its actions."""

from __future__ import annotations

from muxtune.schedule import Action
from runtime.footprint import peaks


def _parse(text: str) -> list[Action]:
    return [Action.parse(word) for word in text.split()]


def test_open_microbatches_add_up_until_their_backward_has_ended():
    actions = _parse("F0.0 F1.0 B0.0 STEP0.0 F1.1 B1.0 B1.1 STEP1.0")
    activations, with_gradients = peaks(actions, {0: 100, 1: 30}, {0: 7, 1: 50})
    assert activations == 130
    # At B0.0: 130 and hTask 0's gradients; at B1.0: 60 and hTask 1's.
    assert with_gradients == 137


def test_gradients_live_until_the_step():
    actions = _parse("F0.0 B0.0 F0.1 B0.1 STEP0.0")
    assert peaks(actions, {0: 10}, {0: 5}) == (10, 15)
