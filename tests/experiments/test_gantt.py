from __future__ import annotations

import pytest

from experiments.gantt import draw_gantt, draw_plan, middle_window, same_windows
from muxtune.plan import extend_schedule, stage_times
from muxtune.schedule import (
    COMPUTE,
    Action,
    ActionSpan,
    StageTimes,
    build_schedule,
    evaluate_schedule,
    iteration_ends_s,
    save_trace,
)
from muxtune.support.errors import UserError
from tests.plans import make_plan


def flush_spans(iterations: int) -> list[ActionSpan]:
    stages = build_schedule([[0]], [2], pp=2, template="flush", steps=[iterations])
    return evaluate_schedule(stages, StageTimes(fwd_s=[[1.0]] * 2, bwd_s=[[2.0]] * 2, p2p_s=[0.0]))


def test_window_is_the_middle_of_the_iterations():
    window = middle_window(flush_spans(7), 3)  # an iteration takes 9 s
    assert (window.first_iteration, window.last_iteration) == (2, 4)
    assert (window.start_s, window.stop_s) == (18.0, 45.0)


def test_window_is_everything_where_there_are_few_iterations():
    window = middle_window(flush_spans(2), 3)
    assert (window.first_iteration, window.last_iteration) == (0, 1)
    assert (window.start_s, window.stop_s) == (0.0, 18.0)


def test_timelines_show_the_same_iterations_each_from_its_own_start():
    measured = [
        ActionSpan(span.stage, span.stream, span.action, 1 + 2 * span.start_s, 1 + 2 * span.end_s)
        for span in flush_spans(7)
    ]
    first, second = same_windows({"simulated": flush_spans(5), "measured": measured}, 3).values()
    assert (first.first_iteration, first.last_iteration) == (1, 3)
    assert (second.first_iteration, second.last_iteration) == (1, 3)
    assert (first.start_s, first.stop_s) == (9.0, 36.0)
    assert (second.start_s, second.stop_s) == (19.0, 73.0)


def test_iterations_of_a_resumed_run_keep_their_numbers(tmp_path):
    """The simulated timeline is of the iterations that the run did, not of others."""
    plan = make_plan()
    spans = evaluate_schedule(extend_schedule(plan, 4, first=1), stage_times(plan))
    window = middle_window(spans, 1)
    assert (window.first_iteration, window.last_iteration) == (2, 2)
    save_trace(tmp_path / "trace.json", spans, "runtime")
    draw_plan(plan, tmp_path / "gantt.png", run_dir=tmp_path)
    assert (tmp_path / "gantt.png").stat().st_size > 5_000


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_draws_two_timelines(tmp_path, suffix):
    plan = make_plan()
    spans = evaluate_schedule(plan.actions, stage_times(plan))
    out = tmp_path / f"gantt{suffix}"
    draw_gantt({"simulated": spans, "measured": spans}, out, labels={0: "a, b", 1: "c"})
    assert out.stat().st_size > 5_000
    assert list(tmp_path.iterdir()) == [out]


def test_an_unknown_format_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(UserError, match=r"ends in \.png"):
        draw_gantt({"simulated": flush_spans(1)}, tmp_path / "gantt.txt")
    assert not list(tmp_path.iterdir())


def test_a_timeline_without_a_complete_iteration_is_refused(tmp_path):
    forward = ActionSpan(0, COMPUTE, Action("F", 0, 0), 0.0, 1.0)
    assert iteration_ends_s([forward]) == []
    with pytest.raises(UserError, match="'measured' has no complete iteration"):
        draw_gantt({"measured": [forward]}, tmp_path / "gantt.png")
