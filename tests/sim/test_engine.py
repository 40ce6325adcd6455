from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings

from muxtune.schedule import COMMUNICATION, COMPUTE, Action, ActionSpan, StageTimes, evaluate_schedule
from sim.engine import simulate_schedule
from tests.sampling import examples
from tests.sim.strategies import Case, cases

RELATIVE = 1e-9  # only the order of additions may differ


def starts_and_ends(spans):
    return {(s.stage, s.action): (s.start_s, s.end_s) for s in spans if s.stream == COMPUTE}


@given(cases(may_contend=False))
@settings(max_examples=examples(150))
def test_engine_agrees_with_the_recurrence_without_contention(case: Case):
    expected = starts_and_ends(evaluate_schedule(case.stages, case.times))
    simulated = starts_and_ends(simulate_schedule(case.stages, case.times))
    assert simulated.keys() == expected.keys()
    for key, times_s in expected.items():
        assert simulated[key] == pytest.approx(times_s, rel=RELATIVE, abs=1e-12)


@given(cases(may_contend=True))
@settings(max_examples=examples(100))
def test_contention_never_makes_an_action_earlier(case: Case):
    alone = starts_and_ends(evaluate_schedule(case.stages, case.times))
    for key, (start_s, end_s) in starts_and_ends(simulate_schedule(case.stages, case.times)).items():
        assert start_s >= alone[key][0] * (1 - RELATIVE)
        assert end_s >= alone[key][1] * (1 - RELATIVE)


@given(cases(may_contend=True))
@settings(max_examples=examples(50))
def test_every_tensor_travels_once_and_a_link_carries_one_at_a_time(case: Case):
    transfers = [s for s in simulate_schedule(case.stages, case.times) if s.stream == COMMUNICATION]
    last = len(case.stages) - 1
    expected = Counter(
        (stage, action)
        for stage, actions in enumerate(case.stages)
        for action in actions
        if (action.kind == "F" and stage < last) or (action.kind == "B" and stage > 0)
    )
    assert Counter((s.stage, s.action) for s in transfers) == expected
    for stage in range(last + 1):
        for kind in ("F", "B"):
            link = sorted(
                (s.start_s, s.end_s) for s in transfers if (s.stage, s.action.kind) == (stage, kind)
            )
            assert all(a[1] <= b[0] for a, b in pairwise(link))


def test_simultaneous_transfers_queue():
    # Stage 0 finishes its forwards after 1 s and 2 s, but a transfer takes 3 s: the second one waits.
    f0, f1, b0, b1 = Action("F", 0, 0), Action("F", 0, 1), Action("B", 0, 0), Action("B", 0, 1)
    stages = [[f0, f1, b0, b1], [f0, b0, f1, b1]]
    times = StageTimes(fwd_s=[[1.0], [1.0]], bwd_s=[[1.0], [1.0]], p2p_s=[3.0])
    spans = simulate_schedule(stages, times)
    assert ActionSpan(0, COMMUNICATION, f1, 4.0, 7.0) in spans
    assert ActionSpan(1, COMPUTE, f1, 7.0, 8.0) in spans
    assert ActionSpan(1, COMPUTE, f1, 6.0, 7.0) in evaluate_schedule(stages, times)


def test_a_deadlock_is_reported():
    f0, f1, b0, b1 = Action("F", 0, 0), Action("F", 0, 1), Action("B", 0, 0), Action("B", 0, 1)
    times = StageTimes(fwd_s=[[1.0]] * 2, bwd_s=[[1.0]] * 2, p2p_s=[0.0])
    with pytest.raises(RuntimeError, match="deadlocks"):
        simulate_schedule([[f0, b0, f1, b1], [f0, f1, b0, b1]], times)
