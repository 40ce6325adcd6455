"""Traces: a format that other people's viewers open, and that we read back exactly."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muxtune.errors import UserError
from muxtune.schedule import Action
from muxtune.trace import (
    COMMUNICATION,
    COMPUTE,
    Span,
    iteration_ends_s,
    load_trace,
    save_trace,
    to_chrome,
    track_name,
)


@st.composite
def spans(draw):
    action = Action(
        draw(st.sampled_from(["F", "B", "STEP"])), draw(st.integers(0, 99)), draw(st.integers(0, 999))
    )
    start_s = draw(st.floats(0, 1e5))
    return Span(
        stage=draw(st.integers(0, 15)),
        stream=draw(st.sampled_from([COMPUTE, COMMUNICATION])),
        action=action,
        start_s=start_s,
        end_s=start_s + draw(st.floats(0, 100)),
    )


@given(st.lists(spans(), max_size=30))
@settings(max_examples=100, deadline=None)
def test_events_have_what_the_chrome_format_requires(given_spans):
    trace = json.loads(json.dumps(to_chrome(given_spans, "simulated")))
    assert trace["displayTimeUnit"] == "ms"
    metadata = [e for e in trace["traceEvents"] if e["ph"] == "M"]
    complete = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    assert len(metadata) + len(complete) == len(trace["traceEvents"])
    assert [e["args"]["name"] for e in metadata if e["name"] == "process_name"] == ["simulated"]
    threads = {e["tid"]: e["args"]["name"] for e in metadata if e["name"] == "thread_name"}
    assert len(threads) == len(metadata) - 1  # one name per track
    assert set(threads.values()) == {track_name(s.stage, s.stream) for s in given_spans}
    assert len(set(threads.values())) == len(threads)
    for event in complete:
        assert {"ph", "name", "cat", "pid", "tid", "ts", "dur", "args"} <= event.keys()
        assert event["tid"] in threads
        assert event["dur"] >= 0
    assert [e["ts"] for e in complete] == sorted(e["ts"] for e in complete)
    assert len(complete) == len(given_spans)


def test_times_are_microseconds_and_names_are_those_of_the_schedule():
    span = Span(1, COMMUNICATION, Action("B", 2, 5), 0.25, 0.75)
    *_, event = to_chrome([span], "measured")["traceEvents"]
    assert event == {
        "ph": "X",
        "name": "B2.5",
        "cat": "B",
        "pid": 0,
        "tid": 3,
        "ts": 250_000.0,
        "dur": 500_000.0,
        "args": {"htask": 2, "number": 5},
    }
    assert track_name(1, COMMUNICATION) == "stage 1 communication"


@given(st.lists(spans(), max_size=30))
@settings(max_examples=100, deadline=None)
def test_a_trace_is_read_back_to_the_nanosecond(tmp_path_factory, given_spans):
    path = tmp_path_factory.mktemp("trace") / "trace.json"
    save_trace(path, given_spans, "simulated")

    expected = sorted(given_spans, key=lambda s: (s.start_s, s.stage))
    again = load_trace(path)
    assert [(s.stage, s.stream, s.action) for s in again] == [(s.stage, s.stream, s.action) for s in expected]
    for read, written in zip(again, expected, strict=True):
        assert read.start_s == pytest.approx(written.start_s, abs=1e-9)
        assert read.end_s == pytest.approx(written.end_s, abs=1e-9)


def test_a_missing_trace_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"cannot read the trace .*none\.json: No such file"):
        load_trace(tmp_path / "none.json")


@pytest.mark.parametrize(
    "content",
    [
        '{"traceEvents": [',
        "[]",
        "{}",
        '{"traceEvents": 3}',
        '{"traceEvents": [{"ph": "X"}]}',
        '{"traceEvents": [{}]}',
        '{"traceEvents": [{"ph": "X", "tid": 0, "ts": 1, "dur": 1, "name": "malloc"}]}',
        '{"traceEvents": [{"ph": "X", "tid": "main", "ts": 1, "dur": 1, "name": "F0.0"}]}',
    ],
)
def test_a_file_that_is_no_trace_of_ours_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "trace.json"
    path.write_text(content)
    with pytest.raises(UserError, match="is not a trace of ours") as caught:
        load_trace(path)
    assert "\n" not in str(caught.value)


def test_an_iteration_ends_with_its_last_step_on_any_stage():
    def step(stage, htask, number, end_s):
        return Span(stage, COMPUTE, Action("STEP", htask, number), end_s, end_s)

    timeline = [
        Span(0, COMPUTE, Action("F", 0, 0), 0.0, 9.0),
        step(0, 0, 0, 3.0),
        step(1, 0, 0, 2.0),
        step(0, 1, 0, 4.0),
        step(0, 0, 1, 6.0),
        step(1, 0, 1, 5.0),
    ]
    assert iteration_ends_s(timeline) == [4.0, 6.0]
    assert iteration_ends_s([]) == []
