"""Orders of injection and limits in flight of one's own: valid, deadlock-free, declared and checked."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muxtune.memory import StageLoad
from muxtune.schedule import (
    StageTimes,
    build_schedule,
    check_own_order,
    check_schedule,
    clocks_in_flight,
    evaluate_schedule,
    inject,
    injected_iteration_s,
    steady_iteration_s,
)
from muxtune.support.errors import SpecError
from tests.muxtune.memory.examples import make_load
from tests.muxtune.schedule.schedules import Problem, own_orders, play_with_bounded_channels
from tests.sampling import examples

EXAMPLES = examples(100)


def check(problem: Problem, stages, **changes) -> None:
    declared = {"in_flight": problem.in_flight} | changes
    limited = problem.template != "gpipe"
    check_schedule(stages, problem.microbatches, carries=problem.carries, in_flight_limit=limited, **declared)


def limit(problem: Problem, stage: int) -> int:
    return clocks_in_flight(
        problem.template,
        problem.microbatches,
        pp=problem.pp,
        stage=stage,
        carries=problem.carries,
        in_flight=problem.in_flight,
    )


@given(own_orders())
@settings(max_examples=EXAMPLES, deadline=None)
def test_what_may_be_is_built_accepted_and_played_over_bounded_channels(problem: Problem):
    check_own_order(
        problem.microbatches,
        pp=problem.pp,
        injection=problem.injection,
        in_flight=problem.in_flight,
        carries=problem.carries,
    )
    stages = problem.build()
    check(problem, stages)
    # A link has room for what its sender may have in flight, as in a run.
    limits = [limit(problem, stage) for stage in range(problem.pp)]
    assert play_with_bounded_channels(stages, capacity=max(limits))


@given(own_orders())
@settings(max_examples=EXAMPLES, deadline=None)
def test_an_iteration_enters_in_the_order_that_is_given(problem: Problem):
    if not problem.injection:
        return
    entered = [a.htask for a in problem.build()[0] if a.kind == "F"]
    first = [h for h in problem.injection if problem.steps[h] > 0]
    assert entered[: len(first)] == first


@given(own_orders())
@settings(max_examples=EXAMPLES, deadline=None)
def test_no_stage_exceeds_the_limit(problem: Problem):
    for stage, actions in enumerate(problem.build()):
        open_ = most = 0
        for action in actions:
            open_ += {"F": 1, "B": -1, "STEP": 0}[action.kind]
            most = max(most, open_)
        assert most <= limit(problem, stage)


@given(own_orders(), st.randoms(use_true_random=False))
@settings(max_examples=EXAMPLES, deadline=None)
def test_the_recurrence_knows_them(problem: Problem, draw):
    stages, htasks = range(problem.pp), range(len(problem.microbatches))
    times = StageTimes(
        fwd_s=[[draw.uniform(1, 2) for _ in htasks] for _ in stages],
        bwd_s=[[draw.uniform(1, 2) for _ in htasks] for _ in stages],
        p2p_s=[draw.uniform(0, 1) for _ in htasks],
    )
    injection = inject(
        problem.buckets,
        problem.microbatches,
        template=problem.template,
        steps=problem.steps,
        carries=problem.carries,
        injection=problem.injection,
        in_flight=problem.in_flight,
    )
    spans = evaluate_schedule(problem.build(), times)
    assert injected_iteration_s(injection, times) == pytest.approx(steady_iteration_s(spans), rel=1e-12)


@given(own_orders(may_carry=False), st.data())
@settings(max_examples=EXAMPLES, deadline=None)
def test_memory_is_counted_with_the_declared_limit(problem: Problem, data):
    loads = [
        make_load(activation=data.draw(st.integers(1, 100)), message=data.draw(st.integers(1, 50)))
        for _ in problem.microbatches
    ]

    for stage, actions in enumerate(problem.build()):
        load = StageLoad(
            first=stage == 0,
            last=stage == problem.pp - 1,
            in_flight=limit(problem, stage),
            in_flight_before=limit(problem, stage - 1) if stage else None,
            backbone_bytes=10,
            table_bytes=1,
            htasks=tuple(loads),
        )
        exact = load.peak(actions, problem.microbatches)
        assert exact.total_bytes <= load.bound(problem.microbatches).total_bytes


def test_one_more_in_flight_is_refused_unless_it_is_declared():
    plain = {"pp": 2, "template": "continuous", "steps": [2]}
    more = build_schedule([[0]], [4], in_flight=(3, 2), **plain)
    assert more != build_schedule([[0]], [4], **plain)
    with pytest.raises(SpecError, match=r"F0.2 is one more than the 2 allowed in flight"):
        check_schedule(more, [4])
    check_schedule(more, [4], in_flight=(3, 2))


def test_one_in_flight_everywhere_is_no_pipeline():
    (first, *_) = build_schedule([[0]], [2], pp=3, template="flush", steps=[1], in_flight=(1, 1, 1))
    assert " ".join(map(str, first)) == "F0.0 B0.0 F0.1 B0.1 STEP0.0"


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"injection": (0, 1)}, r"injection = \[0, 1\]: expected every micro-batch .*: 2 times 0, 1 times 1"),
        ({"injection": (0, 0, 2)}, r"injection = \[0, 0, 2\]: expected every"),
        (
            {"injection": (0, 1, 0), "co_scheduled": True},
            "injection = .*: expected nothing: hTasks",
        ),
        (
            {"injection": (0, 1, 0), "carries": (2, 1)},
            "expected the 2 micro-batches of a carry group",
        ),
        ({"in_flight": (2,)}, r"in_flight = \[2\]: expected 2 integers, one per stage, of at least 1"),
        ({"in_flight": (1, 2)}, "none above the one before"),
        ({"in_flight": (1, 0)}, "of at least 1"),
        ({"in_flight": (2, 1), "carries": (2, 1)}, "of at least 2"),
    ],
)
def test_what_cannot_be_is_refused(own, message):
    with pytest.raises(SpecError, match=message):
        check_own_order((2, 1), pp=2, **own)
