"""The recurrence against an event loop that knows nothing of it, and against closed forms."""

import heapq
import math
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muxtune.schedule import (
    COMPUTE,
    Action,
    ClockTimes,
    StageTimes,
    build_schedule,
    clocks_of,
    evaluate_schedule,
    inject,
    injected_iteration_s,
    iteration_ends_s,
    lower_bound_s,
    makespan_s,
    shared_clocks,
    steady_iteration_s,
)
from muxtune.support.errors import SpecError
from tests.muxtune.schedule.schedules import Problem, problems
from tests.sampling import examples

RELATIVE = 1e-9  # only the order of additions differs
SECONDS = st.floats(1e-4, 10.0)


@st.composite
def timed_problems(draw, **kwargs):
    problem: Problem = draw(problems(**kwargs))
    htasks = len(problem.microbatches)
    row = st.lists(SECONDS, min_size=htasks, max_size=htasks)
    table = st.lists(row, min_size=problem.pp, max_size=problem.pp)
    p2p_s = draw(st.lists(st.floats(0, 3.0), min_size=htasks, max_size=htasks))
    clocks = None
    if problem.co_scheduled:
        kinds = {
            (clock[0].kind, tuple(a.htask for a in clock))
            for clock in clocks_of(problem.build()[0], problem.microbatches, problem.buckets)
            if len(clock) > 1
        } | {(kind, hs) for kind in "FB" for hs in shared_clocks(problem.buckets, problem.microbatches)}
        stages = st.lists(SECONDS, min_size=problem.pp, max_size=problem.pp)
        clocks = ClockTimes(
            buckets=problem.buckets,
            microbatches=problem.microbatches,
            seconds={kind: draw(stages) for kind in sorted(kinds)},
        )
    return problem, StageTimes(fwd_s=draw(table), bwd_s=draw(table), p2p_s=p2p_s, clocks=clocks)


def play_event_by_event(stages, times):
    """Stages that look, whenever anything happens, whether the tensors for their next clock have come."""
    cut = [
        clocks_of(
            actions, times.clocks.microbatches if times.clocks else (), times.clocks and times.clocks.buckets
        )
        for actions in stages
    ]
    now_s, order = 0.0, 0
    events = [(0.0, 0, None)]
    arrived, position, busy, ran = set(), [0] * len(stages), [False] * len(stages), {}
    while events:
        now_s, _, happened = heapq.heappop(events)
        if happened is not None and happened[0] == "arrival":
            arrived.add(happened[1:])
        elif happened is not None:
            _, stage, clock = happened
            busy[stage] = False
            to = stage + {"F": 1, "B": -1, "STEP": len(stages)}[clock[0].kind]
            sent_s = now_s
            for action in clock if 0 <= to < len(stages) else ():  # one after the other over the link
                order += 1
                sent_s += times.p2p_s[action.htask]
                heapq.heappush(events, (sent_s, order, ("arrival", to, action)))
        for stage, clocks in enumerate(cut):
            if busy[stage] or position[stage] == len(clocks):
                continue
            clock = clocks[position[stage]]
            kind, htasks = clock[0].kind, tuple(a.htask for a in clock)
            origin = {"F": stage == 0, "B": stage == len(stages) - 1, "STEP": True}[kind]
            if origin or all((stage, action) in arrived for action in clock):
                table = {"F": times.fwd_s, "B": times.bwd_s}.get(kind)
                seconds = table[stage][htasks[0]] if table else 0.0
                if len(clock) > 1:
                    seconds = times.clocks.seconds[kind, htasks][stage]
                end_s = now_s + seconds
                ran.update({(stage, action): (now_s, end_s) for action in clock})
                busy[stage] = True
                position[stage] += 1
                order += 1
                heapq.heappush(events, (end_s, order, ("done", stage, clock)))
    return ran


@given(timed_problems())
@settings(max_examples=examples(150))
def test_every_action_runs_when_an_event_loop_runs_it(case):
    problem, times = case
    stages = problem.build()
    spans = evaluate_schedule(stages, times)
    expected = play_event_by_event(stages, times)
    assert len(spans) == len(expected) == sum(map(len, stages))
    for span in spans:
        assert (span.start_s, span.end_s) == pytest.approx(expected[span.stage, span.action], rel=RELATIVE)
        assert span.stream == COMPUTE


@given(timed_problems())
@settings(max_examples=examples(100))
def test_a_stage_does_one_thing_at_a_time_in_the_order_of_its_list(case):
    problem, times = case
    stages = problem.build()
    spans = evaluate_schedule(stages, times)
    for stage, actions in enumerate(stages):
        own = [span for span in spans if span.stage == stage]
        assert [span.action for span in own] == actions
        clocks = sorted({(span.start_s, span.end_s) for span in own})
        assert all(a[1] <= b[0] for a, b in pairwise(clocks))


@given(timed_problems(equal_steps=True))
@settings(max_examples=examples(200))
def test_no_iteration_is_shorter_than_the_lower_bound(case):
    problem, times = case
    spans = evaluate_schedule(problem.build(), times)
    bound_s = lower_bound_s(times, problem.microbatches)
    assert makespan_s(spans) >= problem.steps[0] * bound_s * (1 - RELATIVE)
    # Two continuous iterations are too few: the second is early, as nothing is injected behind it.
    if problem.template != "continuous" or problem.steps[0] != 2:
        assert steady_iteration_s(spans) >= bound_s * (1 - RELATIVE)


@given(timed_problems(equal_steps=True))
@settings(max_examples=examples(150))
def test_the_search_needs_no_lists_of_actions(case):
    problem, times = case
    injection = inject(
        problem.buckets,
        problem.microbatches,
        template=problem.template,
        steps=problem.steps,
        co_scheduled=problem.co_scheduled,
    )
    expected = steady_iteration_s(evaluate_schedule(problem.build(), times))
    assert injected_iteration_s(injection, times) == pytest.approx(expected, rel=RELATIVE)


@given(timed_problems(equal_steps=True))
@settings(max_examples=examples(60))
def test_clocks_that_take_as_long_as_their_parts_change_no_lower_bound(case):
    """Work is work: only where a clock is faster than its parts may the bound be lower."""
    problem, times = case
    if times.clocks is None:
        return
    seconds = {
        (kind, htasks): [
            sum((times.fwd_s if kind == "F" else times.bwd_s)[stage][h] for h in htasks)
            for stage in range(problem.pp)
        ]
        for kind, htasks in times.clocks.seconds
    }
    alone = StageTimes(fwd_s=times.fwd_s, bwd_s=times.bwd_s, p2p_s=times.p2p_s)
    shared = replace(alone, clocks=replace(times.clocks, seconds=seconds))
    bound_s = lower_bound_s(alone, problem.microbatches)
    assert lower_bound_s(shared, problem.microbatches) == pytest.approx(bound_s, rel=RELATIVE)


def test_a_clock_without_seconds_is_refused():
    clocks = ClockTimes(buckets=[[0, 1]], microbatches=[1, 1], seconds={("F", (0, 1)): [1.0]})
    times = StageTimes(fwd_s=[[1.0, 1.0]], bwd_s=[[1.0, 1.0]], p2p_s=[0.0, 0.0], clocks=clocks)
    stages = build_schedule([[0, 1]], [1, 1], pp=1, template="flush", steps=[1, 1], co_scheduled=True)
    with pytest.raises(SpecError, match=r"clock_s = 'nothing for B of hTasks \[0, 1\]'"):
        evaluate_schedule(stages, times)


def test_a_shared_clock_waits_for_all_its_tensors_and_sends_at_its_end():
    # stage 0  F |0-3|                          wait  B |10-12|
    # stage 1        |3.75-5.75| B |5.75-9.25|        with 0.25 s and 0.5 s per transfer
    stages = build_schedule([[0, 1]], [1, 1], pp=2, template="flush", steps=[1, 1], co_scheduled=True)
    clocks = ClockTimes(
        buckets=[[0, 1]], microbatches=[1, 1], seconds={("F", (0, 1)): [3.0, 2.0], ("B", (0, 1)): [2.0, 3.5]}
    )
    times = StageTimes(fwd_s=[[9.0] * 2] * 2, bwd_s=[[9.0] * 2] * 2, p2p_s=[0.25, 0.5], clocks=clocks)
    spans = {(s.stage, str(s.action)): (s.start_s, s.end_s) for s in evaluate_schedule(stages, times)}
    for h in (0, 1):
        assert spans[0, f"F{h}.0"] == (0.0, 3.0)
        assert spans[1, f"F{h}.0"] == (3.75, 5.75)
        assert spans[1, f"B{h}.0"] == (5.75, 9.25)
        assert spans[0, f"B{h}.0"] == (10.0, 12.0)
        assert spans[0, f"STEP{h}.0"] == (12.0, 12.0)
    assert lower_bound_s(times, [1, 1]) == 5.5


@given(timed_problems(templates=["continuous"], may_share=False, max_pp=8), st.integers(3, 5))
@settings(max_examples=examples(60))
def test_three_continuous_iterations_already_show_the_pace_of_many(case, iterations):
    problem, times = case

    def pace_s(steps):
        stages = build_schedule(
            problem.buckets,
            problem.microbatches,
            pp=problem.pp,
            template="continuous",
            steps=[steps] * len(problem.microbatches),
        )
        return steady_iteration_s(evaluate_schedule(stages, times))

    # The fill and transients of the first iterations: none in most cases.
    assert pace_s(iterations) == pytest.approx(pace_s(24), rel=0.02)


@given(st.integers(1, 8), st.integers(1, 20), SECONDS, SECONDS, st.integers(1, 3))
@settings(max_examples=examples(100))
def test_balanced_1f1b_takes_its_closed_form(pp, m, f, b, iterations):
    """(m + pp - 1) (f + b): a stage works m (f + b) and waits for pp - 1 forwards and backwards of others."""
    stages = build_schedule([[0]], [m], pp=pp, template="flush", steps=[iterations])
    times = StageTimes(fwd_s=[[f]] * pp, bwd_s=[[b]] * pp, p2p_s=[0.0])
    spans = evaluate_schedule(stages, times)
    expected_s = (m + pp - 1) * (f + b)
    assert steady_iteration_s(spans) == pytest.approx(expected_s, rel=RELATIVE)
    assert makespan_s(spans) == pytest.approx(iterations * expected_s, rel=RELATIVE)
    assert iteration_ends_s(spans) == pytest.approx(
        [(k + 1) * expected_s for k in range(iterations)], rel=RELATIVE
    )


@given(st.integers(2, 6), st.integers(2, 8), SECONDS, SECONDS)
@settings(max_examples=examples(60))
def test_balanced_continuous_iterations_have_no_bubble_where_enough_htasks_rotate(pp, extra, f, b):
    htasks = pp + extra
    stages = build_schedule(
        [[h] for h in range(htasks)], [1] * htasks, pp=pp, template="continuous", steps=[4] * htasks
    )
    times = StageTimes(fwd_s=[[f] * htasks] * pp, bwd_s=[[b] * htasks] * pp, p2p_s=[0.0] * htasks)
    spans = evaluate_schedule(stages, times)
    assert steady_iteration_s(spans) == pytest.approx(lower_bound_s(times, [1] * htasks), rel=RELATIVE)
    assert makespan_s(spans) == pytest.approx((4 * htasks + pp - 1) * (f + b), rel=RELATIVE)


def test_a_pipeline_small_enough_to_check_by_hand():
    # stage 0  F |0-1|      wait      B |6.5-8.5|
    # stage 1        |1.5-3.5| B |3.5-6|           with 0.5 s per transfer
    stages = build_schedule([[0]], [1], pp=2, template="flush", steps=[1])
    times = StageTimes(fwd_s=[[1.0], [2.0]], bwd_s=[[2.0], [2.5]], p2p_s=[0.5])
    spans = {(s.stage, str(s.action)): (s.start_s, s.end_s) for s in evaluate_schedule(stages, times)}
    assert spans == {
        (0, "F0.0"): (0.0, 1.0),
        (1, "F0.0"): (1.5, 3.5),
        (1, "B0.0"): (3.5, 6.0),
        (1, "STEP0.0"): (6.0, 6.0),
        (0, "B0.0"): (6.5, 8.5),
        (0, "STEP0.0"): (8.5, 8.5),
    }
    assert lower_bound_s(times, [1]) == 4.5


def test_the_lower_bound_is_the_work_of_the_busiest_stage():
    times = StageTimes(fwd_s=[[1.0, 2.0], [3.0, 1.0]], bwd_s=[[1.0, 4.0], [1.0, 1.0]], p2p_s=[9.0, 9.0])
    assert lower_bound_s(times, [3, 2]) == max(3 * 2 + 2 * 6, 3 * 4 + 2 * 2)


def test_a_deadlock_is_reported():
    f0, f1, b0, b1 = (Action(kind, 0, n) for kind in "FB" for n in (0, 1))
    times = StageTimes(fwd_s=[[1.0]] * 2, bwd_s=[[1.0]] * 2, p2p_s=[0.0])
    with pytest.raises(RuntimeError, match="the schedule deadlocks"):
        evaluate_schedule([[f0, b0, f1, b1], [f0, f1, b0, b1]], times)


def test_a_step_takes_no_time_of_its_own():
    times = StageTimes(fwd_s=[[1.0]], bwd_s=[[2.0]], p2p_s=[0.0])
    assert times.duration_s(0, Action("STEP", 0, 0)) == 0.0
    assert math.isclose(makespan_s(evaluate_schedule([[Action("STEP", 0, 0)]], times)), 0.0)
