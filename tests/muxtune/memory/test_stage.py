"""Peak of a stage over its schedule."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muxtune.memory import HTaskLoad, KeptBytes, MicrobatchLoad, StageLoad, StageMemory, stage_load
from muxtune.model import PRESETS
from muxtune.schedule import Action, clocks_in_flight
from tests.muxtune.memory.examples import make_load, make_work
from tests.muxtune.schedule.schedules import Problem, problems
from tests.sampling import examples

LLAMA = PRESETS["llama-tiny"]


def peak(
    text: str, *htasks: HTaskLoad, first: bool = True, last: bool = True, in_flight: int = 1
) -> StageMemory:
    load = StageLoad(
        first=first, last=last, in_flight=in_flight, backbone_bytes=1000, table_bytes=100, htasks=htasks
    )
    return load.peak([Action.parse(word) for word in text.split()])


def test_the_parts_add_up():
    m = peak("F0.0 B0.0 STEP0.0", make_load(7, 50, 5, forward=3, backward=2))
    assert m.total_bytes == sum(getattr(m, part.name) for part in fields(m))
    assert (m.backbone_bytes, m.table_bytes, m.adapter_bytes, m.optimizer_bytes) == (1000, 100, 7, 14)
    assert (m.activation_bytes, m.logit_bytes, m.workspace_bytes) == (50, 5, 3)
    allocated = m.with_allocator(0.1)
    assert allocated.allocator_bytes == round(0.1 * m.total_bytes)
    assert allocated.total_bytes == m.total_bytes + allocated.allocator_bytes


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


loads = st.builds(
    make_load,
    *[st.integers(0, 1000)] * 3,
    forward=st.integers(0, 500),
    backward=st.integers(0, 500),
    message=st.integers(0, 50),
    left_gradient=st.integers(0, 50),
)
microbatch_loads = st.builds(
    MicrobatchLoad,
    kept=st.builds(KeptBytes, activation_bytes=st.integers(0, 1000), logit_bytes=st.integers(0, 1000)),
    left_bytes=st.integers(0, 50),
    forward_workspace_bytes=st.integers(0, 500),
    backward_workspace_bytes=st.integers(0, 500),
)


@given(problem=problems(may_carry=True), data=st.data())
@settings(max_examples=examples(150))
def test_no_schedule_needs_more_than_the_bound_and_at_least_its_largest_micro_batch(problem: Problem, data):
    htasks = data.draw(
        st.lists(loads, min_size=len(problem.microbatches), max_size=len(problem.microbatches))
    )
    assert problem.carries is not None
    htasks = [
        replace(load, microbatches=tuple(data.draw(st.lists(microbatch_loads, min_size=n, max_size=n))))
        for load, n in zip(htasks, problem.carries, strict=True)
    ]
    stages = problem.build()
    for stage, actions in enumerate(stages):
        first, last = stage == 0, stage == len(stages) - 1
        load = StageLoad(
            first=first,
            last=last,
            in_flight=clocks_in_flight(
                problem.template, problem.microbatches, pp=problem.pp, stage=stage, carries=problem.carries
            ),
            backbone_bytes=10,
            table_bytes=1,
            htasks=tuple(htasks),
            buckets=problem.shared_buckets or (),
        )
        exact = load.peak(actions, problem.microbatches)
        bound = load.bound(problem.microbatches)
        assert exact.total_bytes <= bound.total_bytes
        largest = max(
            each.open_bytes + max(each.forward_workspace_bytes, each.backward_workspace_bytes)
            for h in htasks
            for each in h.microbatches
        )
        assert exact.total_bytes >= 11 + 3 * load.adapter_bytes + largest


def test_the_micro_batches_of_a_clock_are_open_together_and_their_temporaries_add_up():
    one, other = (make_load(activation=a, forward=f, backward=b) for a, f, b in ((10, 3, 4), (100, 2, 5)))
    load = StageLoad(
        first=True,
        last=True,
        in_flight=1,
        backbone_bytes=0,
        table_bytes=0,
        htasks=(one, other),
        buckets=((0, 1),),
    )
    actions = [Action.parse(word) for word in "F0.0 F1.0 B0.0 B1.0 STEP0.0 STEP1.0".split()]
    m = load.peak(actions, [1, 1])
    assert (m.activation_bytes, m.workspace_bytes) == (110, 9)
    bound = load.bound([1, 1])
    assert (bound.activation_bytes, bound.workspace_bytes) == (110, 9)


def test_instances_repeat_the_backbone_alone():
    one, four = (
        stage_load(
            LLAMA,
            4,
            first=True,
            last=False,
            in_flight=2,
            instances=instances,
            works=[make_work(), make_work()],
        )
        for instances in (1, 4)
    )
    assert (four.backbone_bytes, four.table_bytes) == (4 * one.backbone_bytes, 4 * one.table_bytes)
    assert four.htasks == one.htasks


@pytest.mark.parametrize("name", ["llama-tiny", "gpt2-tiny", "opt-tiny"])
def test_two_ranks_of_a_tensor_parallel_stage_hold_little_more_than_the_stage(name):
    from muxtune.memory import Sharding

    model, actions = PRESETS[name], [Action.parse(word) for word in "F0.0 B0.0 STEP0.0".split()]

    def total(**sharding: object) -> int:
        return (
            stage_load(
                model,
                2,
                first=False,
                last=False,
                in_flight=1,
                instances=1,
                works=[make_work()],
                sharding=Sharding(**sharding),
            )
            .peak(actions)
            .total_bytes
        )

    whole = total()
    assert whole < 2 * total(tp=2) < 1.7 * whole
