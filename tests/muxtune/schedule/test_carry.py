"""Schedules in which sequences spread over micro-batches: carry groups go back in reverse order."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muxtune.schedule import (
    Action,
    ClockTimes,
    StageTimes,
    build_schedule,
    check_schedule,
    clocks_in_flight,
    clocks_of,
    evaluate_schedule,
    inject,
    injected_iteration_s,
    steady_iteration_s,
)
from muxtune.schedule.check import find_deadlock
from muxtune.support.errors import SpecError
from tests.muxtune.schedule.schedules import Problem, play_with_bounded_channels, problems
from tests.sampling import examples

EXAMPLES = examples(150)
CARRYING = problems(may_carry=True)


def check(problem: Problem, stages: list[list[Action]]) -> None:
    check_schedule(
        stages,
        problem.microbatches,
        buckets=problem.shared_buckets,
        in_flight_limit=problem.template != "gpipe",
        carries=problem.carries,
    )


def cut(problem: Problem) -> list[list[tuple[Action, ...]]]:
    return [clocks_of(actions, problem.microbatches, problem.shared_buckets) for actions in problem.build()]


@given(CARRYING)
@settings(max_examples=EXAMPLES)
def test_the_checker_accepts_what_the_generator_builds(problem: Problem):
    stages = problem.build()
    check(problem, stages)
    expected = Counter()
    for h, (m, steps) in enumerate(zip(problem.microbatches, problem.steps, strict=True)):
        expected.update(Action(kind, h, n) for kind in ("F", "B") for n in range(m * steps))
        expected.update(Action("STEP", h, k) for k in range(steps))
    assert all(Counter(actions) == expected for actions in stages)


@given(CARRYING)
@settings(max_examples=EXAMPLES)
def test_a_carry_group_goes_forward_in_order_and_back_in_reverse_on_every_stage(problem: Problem):
    assert problem.carries is not None
    for actions in problem.build():
        at = {action: slot for slot, action in enumerate(actions)}
        for h, (m, steps, carry) in enumerate(
            zip(problem.microbatches, problem.steps, problem.carries, strict=True)
        ):
            for first in range(0, m * steps, carry):
                group = range(first, first + carry)
                forwards = [at[Action("F", h, n)] for n in group]
                backwards = [at[Action("B", h, n)] for n in reversed(group)]
                assert forwards + backwards == sorted(forwards + backwards)


@given(CARRYING)
@settings(max_examples=EXAMPLES)
def test_the_limit_in_flight_grows_by_one_less_than_the_largest_group(problem: Problem):
    assert problem.carries is not None
    for stage, clocks in enumerate(cut(problem)):
        open_ = most = 0
        for clock in clocks:
            open_ += {"F": 1, "B": -1, "STEP": 0}[clock[0].kind]
            most = max(most, open_)
        limit = clocks_in_flight(
            problem.template, problem.microbatches, pp=problem.pp, stage=stage, carries=problem.carries
        )
        if problem.template != "gpipe":
            assert limit == problem.pp - stage - 1 + max(problem.carries)
        assert most <= limit


@given(CARRYING)
@settings(max_examples=EXAMPLES)
def test_a_step_stands_between_its_backwards_and_the_next_forwards(problem: Problem):
    for actions in problem.build():
        at = {action: slot for slot, action in enumerate(actions)}
        for h, (m, steps) in enumerate(zip(problem.microbatches, problem.steps, strict=True)):
            for k in range(steps):
                step = at[Action("STEP", h, k)]
                last = max(at[Action("B", h, n)] for n in range(k * m, (k + 1) * m))
                assert last < step
                assert {a.kind for a in actions[last + 1 : step]} <= {"B", "STEP"}
                if k + 1 < steps:
                    assert step < min(at[Action("F", h, n)] for n in range((k + 1) * m, (k + 2) * m))


@given(CARRYING, st.integers(1, 2))
@settings(max_examples=EXAMPLES)
def test_bounded_channels_never_deadlock(problem: Problem, capacity: int):
    find_deadlock(problem.build(), clocks=cut(problem))
    assert problem.carries is not None
    if problem.template != "gpipe":
        together = max(map(len, problem.buckets)) if problem.co_scheduled else 1
        room = capacity * max(problem.carries)  # a run may leave a stage before the next takes any of it
        find_deadlock(problem.build(), capacity=room, clocks=cut(problem))
        assert play_with_bounded_channels(problem.build(), room * together)


@given(problems(may_carry=True))
@settings(max_examples=EXAMPLES)
def test_without_carry_nothing_changes(problem: Problem):
    plain = Problem(
        buckets=problem.buckets,
        microbatches=problem.microbatches,
        steps=problem.steps,
        pp=problem.pp,
        template=problem.template,
        co_scheduled=problem.co_scheduled,
    )
    ones = tuple(1 for _ in problem.microbatches)
    assert build_schedule(
        plain.buckets,
        plain.microbatches,
        pp=plain.pp,
        template=plain.template,
        steps=plain.steps,
        co_scheduled=plain.co_scheduled,
        carries=ones,
    ) == (plain.build())


@given(CARRYING, st.randoms(use_true_random=False))
@settings(max_examples=EXAMPLES)
def test_a_search_prices_the_schedule_that_is_built(problem: Problem, random):
    stages = problem.build()
    htasks = len(problem.microbatches)

    def table() -> list[list[float]]:
        return [[random.uniform(0.5, 2.0) for _ in range(htasks)] for _ in range(problem.pp)]

    kinds = {
        (clock[0].kind, tuple(action.htask for action in clock))
        for clocks in cut(problem)
        for clock in clocks
        if len(clock) > 1
    }
    clocks = ClockTimes(
        buckets=problem.buckets,
        microbatches=problem.microbatches,
        seconds={kind: [random.uniform(1, 4) for _ in range(problem.pp)] for kind in sorted(kinds)},
    )
    times = StageTimes(
        fwd_s=table(),
        bwd_s=table(),
        p2p_s=[random.uniform(0, 0.2) for _ in range(htasks)],
        clocks=clocks if problem.co_scheduled else None,
    )
    injection = inject(
        problem.buckets,
        problem.microbatches,
        template=problem.template,
        steps=problem.steps,
        co_scheduled=problem.co_scheduled,
        carries=problem.carries,
    )
    assert injected_iteration_s(injection, times) == pytest.approx(
        steady_iteration_s(evaluate_schedule(stages, times)), rel=1e-12
    )


def test_a_sequence_over_two_micro_batches_on_two_stages():
    stages = build_schedule([[0]], [4], pp=2, template="flush", steps=[1], carries=[2])
    assert [" ".join(map(str, actions)) for actions in stages] == [
        "F0.0 F0.1 F0.2 B0.1 F0.3 B0.0 B0.3 B0.2 STEP0.0",
        "F0.0 F0.1 B0.1 F0.2 B0.0 F0.3 B0.3 B0.2 STEP0.0",
    ]


@pytest.mark.parametrize(
    ("stage", "reason"),
    [
        ("F0.0 F0.1 B0.0 B0.1 STEP0.0", "B0.0 runs before B0.1 of its carry group"),
        ("F0.1 F0.0 B0.1 B0.0 STEP0.0", "F0.1 runs before F0.0 of its carry group"),
    ],
)
def test_a_group_in_another_order_is_refused(stage: str, reason: str):
    actions = [[Action.parse(word) for word in stage.split()]]
    with pytest.raises(SpecError, match=reason):
        check_schedule(actions, [2], carries=[2])
