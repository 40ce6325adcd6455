"""Tables of runs that are known by construction."""

from __future__ import annotations

import pytest

from muxtune.plan import Orchestration, stage_times
from muxtune.schedule import evaluate_schedule, iteration_ends_s
from muxtune.support.errors import UserError
from muxtune.validation import compare_run, explain_difference, read_run
from tests.muxtune.validation.runs import STEADY, Reality, make_trace
from tests.plans import make_plan


def compared(plan, reality, **options):
    return compare_run(read_run(plan, make_trace(plan, reality, **options), STEADY))


def test_classes_have_counts_medians_and_errors():
    """The plan says 10 and 20 ms for hTask 0, two micro-batches a step."""

    def slower(stage, action):
        return 10e-3 if (stage, action.kind, action.htask) == (1, "F", 0) else 0.0

    rows = {(r.kind, r.stage, r.htasks): r for r in compared(make_plan(), Reality(work_s=slower)).classes}
    assert len(rows) == 3 * 2 * 2
    row = rows["F", 1, (0,)]
    assert (row.count, row.per_iteration) == (6, 2.0)
    assert (row.predicted_s, row.median_s, row.mean_s) == pytest.approx((0.010, 0.020, 0.020))
    assert row.error == pytest.approx(-0.5)
    assert rows["B", 1, (0,)].error == pytest.approx(0, abs=1e-9)
    assert (rows["STEP", 0, (1,)].predicted_s, rows["STEP", 0, (1,)].error) == (0.0, None)


def test_a_steps_prediction_is_what_its_backwards_leave():
    reality = Reality(work_s=lambda stage, action: {"F": 0.0, "B": -2e-3, "STEP": 5e-3}[action.kind])
    rows = {(r.kind, r.stage, r.htasks): r for r in compared(make_plan(), reality).classes}
    assert rows["B", 0, (0,)].predicted_s == pytest.approx(0.018)
    step = rows["STEP", 0, (0,)]
    assert (step.predicted_s, step.median_s) == pytest.approx((4e-3, 5e-3))


@pytest.mark.parametrize("template", ["continuous", "flush"])
def test_what_a_stage_does_adds_up_to_the_iteration(template):
    plan = make_plan(template=template)
    reality = Reality(
        work_s=lambda stage, action: 2e-3 if stage else 0.0,
        pause_s=lambda stage, action: 1e-3,
        transfer_s=lambda stage, action: 3e-3,
        call_s=1e-4,
    )
    tables = compared(plan, reality)
    steady = [row for row in tables.iterations if row.steady]
    assert [row.step for row in steady] == list(STEADY)
    for stage in tables.stages:
        columns = (stage.forward_s, stage.backward_s, stage.step_s, stage.waiting_s, stage.between_s)
        for side in ("predicted", "measured"):
            mean_s = sum(getattr(row.seconds, side) for row in steady) / 3
            assert sum(getattr(column, side) for column in columns) == pytest.approx(mean_s)
    assert tables.stages[1].step_s.measured == pytest.approx(2 * 2e-3)
    assert tables.stages[0].between_s.predicted == 0
    if template == "flush":  # otherwise forwards of the first iteration that counts lie before it
        assert tables.stages[0].forward_s.predicted == pytest.approx(2 * 0.010 + 2 * 0.012)
        assert tables.stages[0].between_s.measured >= 10 * 1e-3  # ten actions, each after a pause


def test_the_slowest_iteration_says_where_it_lost_its_time():
    def pause(stage, action):
        return 0.05 if (stage, str(action)) == (1, "B1.4") else 0.0

    paused = compared(make_plan(template="flush"), Reality(pause_s=pause)).slowest
    assert (paused.step, paused.stage, paused.action, paused.place) == (2, 1, "B1.4", "before")
    assert paused.place_excess_s == pytest.approx(0.05)
    assert 0 < paused.excess_s <= 0.05 + 1e-12

    worked = compared(make_plan(template="flush"), Reality(work_s=pause)).slowest
    assert (worked.action, worked.place) == ("B1.4", "in")
    late = Reality(transfer_s=lambda stage, action: 10 * pause(1 - stage, action))
    sent = compared(make_plan(template="flush"), late).slowest
    assert (sent.stage, sent.action, sent.place) == (0, "B1.4", "message")


def test_a_resumed_run_is_compared_from_where_it_went_on():
    plan = make_plan()
    run = read_run(plan, make_trace(plan, Reality(), iterations=4, first=2), (3,))
    tables = compare_run(run)
    assert [(row.step, row.steady) for row in tables.iterations] == [(2, False), (3, True)]
    assert tables.iterations[1].seconds.error == pytest.approx(0, abs=1e-9)


def test_hTasks_that_share_clocks_are_rows_together():  # noqa: N802
    plan = make_plan(orchestration=Orchestration(mode="interleaved"))
    spans = evaluate_schedule(plan.actions, stage_times(plan))
    run = read_run(plan, spans, (1,))
    tables = compare_run(run)
    shared = [row for row in tables.classes if row.htasks == (1, 0)]
    assert {(row.kind, row.stage) for row in shared} == {(kind, s) for kind in ("F", "B") for s in (0, 1)}
    assert all(row.error == pytest.approx(0, abs=1e-9) for row in shared)
    ends_s = iteration_ends_s(spans)
    explanation = explain_difference(
        run, predicted_s=plan.predicted.iteration_s, measured_s=ends_s[1] - ends_s[0]
    )
    assert sum(part.seconds for part in explanation.parts) == pytest.approx(
        explanation.difference_s, abs=1e-12
    )


def test_a_trace_of_something_else_is_refused():
    plan = make_plan()
    with pytest.raises(UserError, match="no complete iteration"):
        read_run(plan, [], STEADY)
    spans = [span for span in make_trace(plan, Reality()) if (span.stage, str(span.action)) != (1, "F0.3")]
    with pytest.raises(UserError, match=r"no F0\.3 on stage 1"):
        read_run(plan, spans, STEADY)
