"""Traces: a format that other people's viewers open, and that we read back exactly."""

import json
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muxtune.schedule import (
    COMMUNICATION,
    COMPUTE,
    Action,
    ActionSpan,
    OperatorSpan,
    iteration_ends_s,
    load_trace,
    save_trace,
    track_name,
)
from muxtune.schedule.trace import to_chrome
from muxtune.support.errors import UserError
from tests.perfetto import perfetto_stacks
from tests.sampling import examples


@st.composite
def spans(draw):
    action = Action(
        draw(st.sampled_from(["F", "B", "STEP"])), draw(st.integers(0, 99)), draw(st.integers(0, 999))
    )
    start_s = draw(st.floats(0, 1e5))
    return ActionSpan(
        stage=draw(st.integers(0, 15)),
        stream=draw(st.sampled_from([COMPUTE, COMMUNICATION])),
        action=action,
        start_s=start_s,
        end_s=start_s + draw(st.floats(0, 100)),
    )


@given(st.lists(spans(), max_size=30))
@settings(max_examples=examples(100))
def test_events_have_what_the_chrome_format_requires(given_spans):
    trace = json.loads(json.dumps(to_chrome(given_spans, "simulated")))
    assert trace["displayTimeUnit"] == "ms"
    metadata = [e for e in trace["traceEvents"] if e["ph"] == "M"]
    complete = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    assert len(metadata) + len(complete) == len(trace["traceEvents"])
    assert [e["args"]["name"] for e in metadata if e["name"] == "process_name"] == ["simulated"]
    threads = {e["tid"]: e["args"]["name"] for e in metadata if e["name"] == "thread_name"}
    assert len(threads) == len(metadata) - 1  # each is named once
    assert set(threads.values()) == {track_name(s.stage, s.stream) for s in given_spans}
    for event in complete:
        assert {"ph", "name", "cat", "pid", "tid", "ts", "dur", "args"} <= event.keys()
        assert event["tid"] in threads
        assert event["dur"] >= 0
    assert [e["ts"] for e in complete] == sorted(e["ts"] for e in complete)
    assert len(complete) == len(given_spans)


@st.composite
def timelines(draw):
    """Spans and operators at any time, in nanoseconds, so that much of it starts or ends together."""

    def interval():
        start_ns = draw(st.integers(0, 12))
        return start_ns * 1e-9, (start_ns + draw(st.integers(0, 8))) * 1e-9

    streams = st.sampled_from([COMPUTE, COMMUNICATION])
    actions = [
        ActionSpan(draw(st.integers(0, 1)), draw(streams), Action("F", i, 0), *interval())
        for i in range(draw(st.integers(0, 8)))
    ]
    operators = [
        OperatorSpan(
            draw(st.integers(0, 1)), draw(streams), Action("F", i, 0), f"op {i}", "base", *interval()
        )
        for i in range(draw(st.integers(0, 8)))
    ]
    return actions, operators


def complete_events(*arguments):
    trace = json.loads(json.dumps(to_chrome(arguments[0], "simulated", *arguments[1:])))
    return [event for event in trace["traceEvents"] if event["ph"] == "X"]


@pytest.mark.parametrize("to_ns", [int, round], ids=["cut", "rounded"])
@given(timelines())
@settings(max_examples=examples(200))
def test_perfetto_drops_nothing_of_any_timeline(to_ns, timeline):
    events = complete_events(*timeline)
    assert len(events) == len(timeline[0]) + sum(span.end_s > span.start_s for span in timeline[1])
    perfetto_stacks(events, to_ns)
    for thread in {event["tid"] for event in events}:
        starts = [event["ts"] for event in events if event["tid"] == thread]
        assert starts == sorted(starts)


@pytest.mark.parametrize("to_ns", [int, round], ids=["cut", "rounded"])
@given(st.lists(st.integers(1, 10**13), min_size=2, max_size=9, unique=True))
@settings(max_examples=examples(200))
def test_operators_lie_inside_their_action_to_the_last_nanosecond(to_ns, cuts_ns):
    # They fill the action without a gap, at times that no microsecond divides.
    cuts = [ns * 1e-9 for ns in sorted(cuts_ns)]
    action = Action("F", 0, 3)
    operators = [
        OperatorSpan(0, COMPUTE, action, "linear", "base", start_s, end_s)
        for start_s, end_s in pairwise(cuts)
    ]
    events = complete_events([ActionSpan(0, COMPUTE, action, cuts[0], cuts[-1])], operators)
    assert {event["tid"] for event in events} == {0}
    names = perfetto_stacks(events, to_ns)
    assert names == [[]] + [["F0.3"]] * len(operators)


def test_an_operator_says_what_it_belongs_to():
    span = OperatorSpan(2, COMPUTE, Action("B", 1, 4), "lora 0", "adapter", 1e-6, 3e-6)
    (event,) = complete_events([], [span])
    assert (event["name"], event["cat"], event["tid"]) == ("lora 0", "operator", 4)
    assert (event["ts"], event["dur"]) == (1.0, 2.0)
    assert event["args"] == {"action": "B1.4", "role": "adapter"}


def test_communication_at_once_gets_a_second_thread_of_the_same_name():
    forward = ActionSpan(1, COMMUNICATION, Action("F", 0, 1), 0.0, 4.0)
    backward = ActionSpan(1, COMMUNICATION, Action("B", 0, 0), 1.0, 2.0)
    later = ActionSpan(1, COMMUNICATION, Action("F", 0, 2), 4.0, 5.0)
    events = to_chrome([forward, backward, later], "simulated")["traceEvents"]
    threads = {event["name"]: event["tid"] for event in events if event["ph"] == "X"}
    assert threads["F0.1"] == threads["F0.2"] == 3
    assert threads["B0.0"] != 3
    names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert names == dict.fromkeys(threads.values(), "stage 1 communication")


def test_actions_of_a_shared_clock_lie_inside_each_other():
    clock = [ActionSpan(0, COMPUTE, Action("F", htask, 0), 0.0, 2.0) for htask in (1, 2)]
    events = complete_events(clock, [OperatorSpan(0, COMPUTE, clock[1].action, "norm", "base", 0.5, 1.0)])
    assert perfetto_stacks(events, round)[2] == ["F1.0", "F2.0"]


def test_times_are_microseconds_and_names_are_those_of_the_schedule():
    span = ActionSpan(1, COMMUNICATION, Action("B", 2, 5), 0.25, 0.75)
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
@settings(max_examples=examples(100))
def test_a_trace_is_read_back_to_the_nanosecond(tmp_path_factory, given_spans):
    path = tmp_path_factory.mktemp("trace") / "trace.json"
    save_trace(path, given_spans, "simulated")

    left = list(given_spans)
    for read in load_trace(path):
        match = next(written for written in left if same_to_the_nanosecond(read, written))
        left.remove(match)
    assert not left


def test_operators_are_left_out_where_actions_are_read(tmp_path):
    action = ActionSpan(0, COMPUTE, Action("F", 0, 0), 0.0, 1.0)
    save_trace(
        tmp_path / "t.json",
        [action],
        "simulated",
        [OperatorSpan(0, COMPUTE, action.action, "norm", "base", 0, 1)],
    )
    assert load_trace(tmp_path / "t.json") == [action]


def test_a_trace_from_before_there_were_operators_is_read(tmp_path):
    (tmp_path / "t.json").write_text(
        '{"displayTimeUnit": "ms", "traceEvents": [{"ph": "M", "name": "process_name", "pid": 0, "tid": 0, '
        '"args": {"name": "runtime"}}, {"ph": "M", "name": "thread_name", "pid": 0, "tid": 3, "args": '
        '{"name": "stage 1 communication"}}, {"ph": "X", "name": "B0.2", "cat": "B", "pid": 0, "tid": 3, '
        '"ts": 1500000.25, "dur": 250000.0, "args": {"htask": 0, "number": 2}}]}'
    )
    assert load_trace(tmp_path / "t.json") == [
        ActionSpan(1, COMMUNICATION, Action("B", 0, 2), 1.50000025, 1.75000025)
    ]


def same_to_the_nanosecond(a, b):
    return (a.stage, a.stream, a.action) == (b.stage, b.stream, b.action) and (
        abs(a.start_s - b.start_s) < 1e-9 and abs(a.end_s - b.end_s) < 1.5e-9
    )


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
        return ActionSpan(stage, COMPUTE, Action("STEP", htask, number), end_s, end_s)

    timeline = [
        ActionSpan(0, COMPUTE, Action("F", 0, 0), 0.0, 9.0),
        step(0, 0, 0, 3.0),
        step(1, 0, 0, 2.0),
        step(0, 1, 0, 4.0),
        step(0, 0, 1, 6.0),
        step(1, 0, 1, 5.0),
    ]
    assert iteration_ends_s(timeline) == [4.0, 6.0]
    assert iteration_ends_s([]) == []
