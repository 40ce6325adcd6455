"""Peak of a stage over its schedule."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muxtune.memory import (
    HTaskLoad,
    KeptBytes,
    MicrobatchLoad,
    Sharding,
    StageLoad,
    StageMemory,
    backbone_bytes,
    htask_load,
    table_bytes,
)
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


@pytest.mark.parametrize("name", ["llama-tiny", "gpt2-tiny", "opt-tiny"])
def test_two_ranks_of_a_tensor_parallel_stage_hold_little_more_than_the_stage(name):
    model, actions = PRESETS[name], [Action.parse(word) for word in "F0.0 B0.0 STEP0.0".split()]

    def total(sharding: Sharding) -> int:
        ends = {"first": False, "last": False}
        load = StageLoad(
            **ends,
            in_flight=1,
            backbone_bytes=backbone_bytes(model, 2, **ends, sharding=sharding),
            table_bytes=table_bytes(model),
            htasks=(htask_load(model, 2, **ends, works=(make_work(),), sharding=sharding),),
        )
        return load.peak(actions).total_bytes

    whole = total(Sharding())
    assert whole < 2 * total(Sharding(tp=2)) < 1.7 * whole
