"""The fast recurrence against one that is written as its definition reads."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from muxtune.schedule import Action, StageTimes, build_schedule, evaluate_schedule
from tests.sampling import examples

SECONDS = st.floats(0.0, 10.0)


@st.composite
def schedules(draw):
    pp = draw(st.integers(1, 5))
    htasks = draw(st.integers(1, 4))
    microbatches = draw(st.lists(st.integers(1, 4), min_size=htasks, max_size=htasks))
    order = draw(st.permutations(range(htasks)))
    cut = draw(st.integers(0, htasks))
    buckets = [bucket for bucket in (order[:cut], order[cut:]) if bucket]
    template = draw(st.sampled_from(["flush", "continuous"]))
    steps = [draw(st.integers(1, 4))] * htasks
    stages = build_schedule(buckets, microbatches, pp=pp, template=template, steps=steps)
    rows = st.lists(st.lists(SECONDS, min_size=htasks, max_size=htasks), min_size=pp, max_size=pp)
    p2p_s = draw(st.lists(SECONDS, min_size=htasks, max_size=htasks))
    return stages, StageTimes(fwd_s=draw(rows), bwd_s=draw(rows), p2p_s=p2p_s)


def reference(stages, times):
    """Start and end of every action: ``start = max(end of the one before, arrival of its tensor)``."""
    ends: dict[tuple[int, Action], float] = {}
    starts: dict[tuple[int, Action], float] = {}
    waiting = [(stage, slot) for stage, actions in enumerate(stages) for slot in range(len(actions))]
    while waiting:
        later = []
        for stage, slot in waiting:
            action = stages[stage][slot]
            before = (stage, stages[stage][slot - 1]) if slot else None
            source = {"F": stage - 1, "B": stage + 1, "STEP": -1}[action.kind]
            sent = (source, action) if 0 <= source < len(stages) else None
            if any(need is not None and need not in ends for need in (before, sent)):
                later.append((stage, slot))
                continue
            free_s = ends[before] if before else 0.0
            arrival_s = ends[sent] + times.p2p_s[action.htask] if sent else 0.0
            starts[stage, action] = max(free_s, arrival_s)
            ends[stage, action] = starts[stage, action] + times.duration_s(stage, action)
        assert len(later) < len(waiting), "deadlock"
        waiting = later
    return starts, ends


@settings(max_examples=examples(200))
@given(schedules())
def test_spans_are_those_of_the_definition_bit_by_bit(drawn):
    stages, times = drawn
    starts, ends = reference(stages, times)
    spans = evaluate_schedule(stages, times)
    assert {(span.stage, span.action): span.start_s for span in spans} == starts
    assert {(span.stage, span.action): span.end_s for span in spans} == ends
    assert len(spans) == sum(map(len, stages))
    for stage, actions in enumerate(stages):
        assert [span.action for span in spans if span.stage == stage] == actions


def test_a_deadlock_is_found():
    stages = [[Action("B", 0, 0)], [Action("F", 0, 0)]]
    times = StageTimes(fwd_s=[[1.0]] * 2, bwd_s=[[1.0]] * 2, p2p_s=[0.0])
    with pytest.raises(RuntimeError, match="deadlocks"):
        evaluate_schedule(stages, times)
