"""Stages that execute operators: the same schedule, in as many events as there are operators."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from simpy import Environment

from muxtune.schedule import COMMUNICATION, COMPUTE, StageTimes, build_schedule, evaluate_schedule
from sim.engine import play_clocks
from sim.noise import Noise
from sim.operators import OperatorWork
from sim.program import Launches, Program
from sim.streams import program_seconds
from tests.sampling import examples
from tests.sim.programs import node
from tests.sim.strategies import Case, OperatorCase, operator_cases

RELATIVE = 1e-9  # only the order of additions may differ
SLOW_DRAWS = settings(max_examples=examples(60), suppress_health_check=[HealthCheck.too_slow])


def play(given: OperatorCase, *, contention: float | None = None, noise: Noise | None = None):
    work = OperatorWork(
        given.programs,
        stages=len(given.case.stages),
        contention=given.contention if contention is None else contention,
        noise=noise,
    )
    return play_clocks(given.case.clocks, work, given.case.times.p2p_s, noise), work


def fixed_case() -> OperatorCase:
    """One hTask with three micro-batches on two stages; every action is four operators."""
    graph = (node(1), node(2, 0, stream="communication"), node(1, 0), node(1, 1, 2))
    program = Program.launched(
        {0: graph}, Launches(compute=((0, 0), (0, 2), (0, 3)), communication=((0, 1),))
    )
    seconds = [[program_seconds(program)]] * 2
    case = Case(
        stages=build_schedule([[0]], [3], pp=2, template="flush", steps=[1]),
        times=StageTimes(fwd_s=seconds, bwd_s=seconds, p2p_s=[0.5]),
        microbatches=(3,),
    )
    return OperatorCase(case=case, programs=lambda *_: program, contention=0.0)


def starts_and_ends(spans):
    return {(s.stage, s.action): (s.start_s, s.end_s) for s in spans if s.stream == COMPUTE}


@given(operator_cases())
@SLOW_DRAWS
def test_operators_take_as_long_as_the_clocks_of_the_recurrence(given_case):
    expected = starts_and_ends(evaluate_schedule(given_case.case.stages, given_case.case.times))
    spans, _ = play(given_case)
    simulated = starts_and_ends(spans)
    assert simulated.keys() == expected.keys()
    for key, times_s in expected.items():
        assert simulated[key] == pytest.approx(times_s, rel=RELATIVE, abs=1e-12)


@given(operator_cases(may_contend=True))
@SLOW_DRAWS
def test_every_operator_runs_once_inside_its_action(given_case):
    spans, work = play(given_case)
    actions = starts_and_ends(spans)
    clocks = [
        (stage, c) for stage, own in enumerate(given_case.case.clocks) for c in own if c[0].kind != "STEP"
    ]
    assert work.executed == len(work.log) == sum(len(given_case.programs(*clock)) for clock in clocks)
    assert len(list(work.log)) == work.executed
    for operator in work.log:
        start_s, end_s = actions[operator.stage, operator.action]
        assert start_s <= operator.start_s <= operator.end_s <= end_s


@given(operator_cases(may_contend=True), st.sampled_from([0.0, 0.2]))
@SLOW_DRAWS
def test_a_simulation_is_the_same_for_the_same_seed(given_case, sigma):
    first_spans, first = play(given_case, noise=Noise(sigma=sigma, seed=3))
    second_spans, second = play(given_case, noise=Noise(sigma=sigma, seed=3))
    assert first_spans == second_spans
    assert list(first.log) == list(second.log)


def test_another_seed_gives_another_timeline():
    timelines = [play(fixed_case(), noise=Noise(sigma=0.2, seed=seed))[0] for seed in (1, 2)]
    assert timelines[0] != timelines[1]


@given(operator_cases(may_contend=True), st.floats(0, 3), st.floats(0, 3))
@SLOW_DRAWS
def test_more_contention_ends_nothing_earlier(given_case, a, b):
    # Of a clock alone see test_streams; the clocks' order on stages and links does not depend on durations.
    less, _ = play(given_case, contention=min(a, b))
    more, _ = play(given_case, contention=max(a, b))
    later = starts_and_ends(more)
    for key, (_, end_s) in starts_and_ends(less).items():
        assert later[key][1] >= end_s * (1 - RELATIVE) - 1e-12


@given(operator_cases(may_contend=True))
@SLOW_DRAWS
def test_transfers_of_a_clock_queue_on_their_link(given_case):
    spans, _ = play(given_case)
    transfers = [span for span in spans if span.stream == COMMUNICATION]
    for stage in range(len(given_case.case.stages)):
        for kind in ("F", "B"):
            link = sorted(
                (s.start_s, s.end_s) for s in transfers if (s.stage, s.action.kind) == (stage, kind)
            )
            for (_, end_s), (start_s, _) in pairwise(link):
                assert end_s <= start_s


def test_each_operator_is_an_event_of_simpy(monkeypatch):
    steps = []
    original = Environment.step
    monkeypatch.setattr(Environment, "step", lambda env: (steps.append(env), original(env))[1])
    _, work = play(fixed_case())
    assert work.executed == 2 * 2 * 3 * 4  # stages, directions, micro-batches, operators
    assert len(steps) >= work.executed
