"""The fullest moment of a stage's actions, reckoned by hand."""

from __future__ import annotations

from muxtune.memory import (
    HTaskLoad,
    StageLoad,
    StageMemory,
)
from muxtune.schedule import Action
from tests.muxtune.memory.examples import make_load


def peak(
    text: str, *htasks: HTaskLoad, first: bool = True, last: bool = True, in_flight: int = 1
) -> StageMemory:
    load = StageLoad(
        first=first, last=last, in_flight=in_flight, backbone_bytes=1000, table_bytes=100, htasks=htasks
    )
    return load.peak([Action.parse(word) for word in text.split()])


def test_different_micro_batches_are_open_together_only_where_the_schedule_has_them_so():
    small, large = make_load(activation=10), make_load(activation=100)
    one_after_the_other = "F0.0 F0.1 B0.0 B0.1 STEP0.0 F1.0 F1.1 B1.0 B1.1 STEP1.0"
    in_turns = "F0.0 F1.0 B0.0 F0.1 B1.0 F1.1 B0.1 STEP0.0 B1.1 STEP1.0"
    assert peak(one_after_the_other, small, large).activation_bytes == 200
    assert peak(in_turns, small, large).activation_bytes == 110


def test_gradients_are_held_from_the_first_backward_to_the_step():
    m = peak("F0.0 B0.0 F0.1 B0.1 STEP0.0 F1.0 B1.0 STEP1.0", make_load(7, 50), make_load(20, 50))
    assert (m.gradient_bytes, m.activation_bytes) == (7, 50)
    m = peak("F0.0 F1.0 B0.0 STEP0.0 B1.0 STEP1.0", make_load(70, 1), make_load(20, 1))
    assert (m.gradient_bytes, m.activation_bytes) == (70, 1)


def test_temporaries_count_in_their_own_action_only():
    m = peak(
        "F0.0 B0.0 STEP0.0 F1.0 B1.0 STEP1.0",
        make_load(activation=100),
        make_load(activation=20, backward=50),
    )
    assert (m.activation_bytes, m.workspace_bytes) == (100, 0)


def test_what_is_left_stays_until_its_own_backward_and_its_gradient_until_the_group_is_back():
    carrying = make_load(activation=10, left=(5, 3), left_gradient=7)
    m = peak("F0.0 F0.1 B0.1 B0.0 STEP0.0", carrying)
    assert (m.activation_bytes, m.chunk_kv_bytes) == (20, 5 + 3)
    m = peak("F0.0 F0.1 B0.1 F0.2 B0.0 F0.3 B0.3 B0.2 STEP0.0", carrying)
    assert (m.activation_bytes, m.chunk_kv_bytes) == (20, 5 + 7 + 5)  # with micro-batches 0 and 2


def test_gradients_of_what_was_left_can_make_the_fullest_moment_a_backward():
    m = peak("F0.0 F0.1 B0.1 B0.0 STEP0.0", make_load(activation=2, left=(5, 0), left_gradient=7))
    assert (m.activation_bytes, m.chunk_kv_bytes) == (2, 5 + 7)
    m = peak("F0.0 F0.1 B0.1 B0.0 STEP0.0", make_load(adapter=1, left=(5, 0), left_gradient=7, backward=2))
    assert (m.gradient_bytes, m.chunk_kv_bytes, m.workspace_bytes) == (1, 5 + 7, 2)


def test_a_middle_stage_has_two_receives_per_direction_what_it_works_on_and_sent_gradients():
    actions = "F0.0 F0.1 B0.0 F0.2 B0.1 F0.3 B0.2 B0.3 STEP0.0"
    m = peak(actions, make_load(message=1), first=False, last=False, in_flight=2)
    assert m.message_bytes == 2 + 2 + 1 + 3
    assert peak(actions, make_load(message=1), last=False, in_flight=2).message_bytes == 2 + 1
    assert peak(actions, make_load(message=1), first=False, in_flight=1).message_bytes == 2 + 2
    assert peak(actions, make_load(message=1)).message_bytes == 0
