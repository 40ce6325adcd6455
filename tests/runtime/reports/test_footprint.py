"""Peaks of a stage's memory over its actions."""

from __future__ import annotations

from dataclasses import replace

from muxtune.schedule import Action
from runtime.reports.footprint import ActionBytes, peaks


def _parse(text: str) -> list[Action]:
    return [Action.parse(word) for word in text.split()]


def _seen(kept: dict[tuple[int, int], int], messages: list[int], **workspace: dict[int, int]) -> ActionBytes:
    return ActionBytes(
        kept=kept,
        forward_workspace=workspace.get("forward", {}),
        backward_workspace=workspace.get("backward", {}),
        messages=messages,
    )


def test_open_microbatches_add_up_until_their_backward_has_ended():
    actions = _parse("F0.0 F1.0 B0.0 STEP0.0 F1.1 B1.0 B1.1 STEP1.0")
    seen = _seen({(0, 0): 100, (1, 0): 30, (1, 1): 40}, [0] * 6)
    alone, everything = peaks(actions, [1, 2], seen, [7, 50])
    assert alone == 130
    # At F1.0: 130; after B1.0: 40 and hTask 1's gradients, still so in B1.1, which ends with 50.
    assert everything == 130


def test_gradients_live_from_the_end_of_a_backward_to_the_step():
    actions = _parse("F0.0 B0.0 F0.1 B0.1 STEP0.0 F0.2 B0.2 F0.3 B0.3 STEP0.1")
    seen = _seen({(0, 0): 10, (0, 1): 20}, [0] * 8)
    assert peaks(actions, [2], seen, [5]) == (20, 25)


def test_messages_and_the_temporaries_of_the_running_action_count():
    actions = _parse("F0.0 B0.0 STEP0.0")
    kept = {(0, 0): 10}
    assert peaks(actions, [1], _seen(kept, [3, 4]), [0]) == (10, 14)
    assert peaks(actions, [1], _seen(kept, [3, 4], forward={0: 9}), [0]) == (10, 22)
    assert peaks(actions, [1], _seen(kept, [3, 4], backward={0: 9}), [0]) == (10, 23)


def test_later_steps_keep_what_the_same_position_kept():
    actions = _parse("F0.0 F0.1 B0.0 B0.1 STEP0.0 F0.2 F0.3 B0.2 B0.3 STEP0.1")
    assert peaks(actions, [2], _seen({(0, 0): 1, (0, 1): 2}, [0] * 8), [0]) == (3, 3)


def test_gradients_of_what_was_left_live_while_their_carry_group_goes_back():
    actions = _parse("F0.0 F0.1 B0.1 F0.2 B0.0 F0.3 B0.3 B0.2 STEP0.0")
    seen = replace(_seen({(0, n): 10 for n in range(4)}, [0] * 8), left_gradients={0: 7})
    assert peaks(actions, [4], seen, [0], [2]) == (27, 27)
    assert peaks(_parse("F0.0 F0.1 B0.1 B0.0 STEP0.0"), [2], seen, [0], [2]) == (20, 20)
    assert peaks(_parse("F0.0 F0.1 B0.1 B0.0 STEP0.0"), [2], seen, [4], [2]) == (20, 21)
