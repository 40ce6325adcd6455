"""Report of a timeline that is known by construction."""

from __future__ import annotations

import pytest

from muxtune.plan import IterationTokens, Parallelism, extend_schedule
from muxtune.schedule import COMPUTE, Action, ActionSpan, StageTimes, evaluate_schedule
from muxtune.support.errors import UserError
from runtime.reports.footprint import MeasuredMemory
from runtime.reports.report import StageRecord, build_report, load_report, save_report, stage_records
from tests.plans import make_plan

MEMORY = MeasuredMemory(
    backbone_bytes=1,
    table_bytes=2,
    adapter_bytes=3,
    optimizer_bytes=4,
    activation_peak_bytes=5,
    message_peak_bytes=6,
    workspace_peak_bytes=7,
    peak_bytes=8,
    process_peak_bytes=9,
    process_start_bytes=1,
)


def _report(steps: int = 4, first_step: int = 0):
    plan = make_plan(template="continuous")
    times = StageTimes(fwd_s=[[1.0, 2.0]] * 2, bwd_s=[[3.0, 4.0]] * 2, p2p_s=[0.5, 0.5])
    spans = evaluate_schedule(extend_schedule(plan, steps, first=first_step), times)
    records = [
        StageRecord(spans=[span for span in spans if span.stage == stage], memory=MEMORY) for stage in (0, 1)
    ]
    tokens = [IterationTokens(all=400, billed=300, effective=200)] * (steps - first_step)
    return build_report(plan, steps=steps, first_step=first_step, records=records, tokens=tokens), spans


def test_iterations_and_medians_are_those_of_the_timeline():
    report, spans = _report()
    assert len(report.iteration_s) == 4
    assert sum(report.iteration_s) == pytest.approx(max(s.end_s for s in spans))
    assert report.steady_steps == (1, 2, 3)
    assert report.median_iteration_s == sorted(report.iteration_s[1:])[1]
    assert report.effective_tokens_per_s == pytest.approx(200 / report.median_iteration_s)
    assert report.fwd_s[0] == pytest.approx((1.0, 2.0))
    assert report.bwd_s[1] == pytest.approx((3.0, 4.0))
    assert report.step_s == ((0.0, 0.0), (0.0, 0.0))


def test_a_stage_of_several_ranks_has_the_times_of_its_first_and_the_memory_of_its_fullest():
    mesh = Parallelism(tp=2, pp=2, dp=2, layers_per_stage=(4, 4))
    peaks = [10, 11, 20, 21, 13, 12, 22, 29]  # rank = (replica * 2 + stage) * 2 + shard
    ranks = [
        StageRecord(
            spans=[ActionSpan(0, COMPUTE, Action("F", rank, 0), 0.0, 1.0)],
            memory=MEMORY.model_copy(update={"peak_bytes": peak}),
        )
        for rank, peak in enumerate(peaks)
    ]
    stages = stage_records(ranks, mesh)
    assert [record.spans[0].action.htask for record in stages] == [0, 2]
    assert [record.memory.peak_bytes for record in stages] == [13, 29]
    assert stage_records([], mesh) == []  # on ranks that nobody sent records to


def test_busy_time_is_that_of_the_steady_window():
    report, spans = _report()
    start_s = report.iteration_s[0]
    inside = [s for s in spans if s.stage == 0 and s.stream == COMPUTE]
    busy_s = sum(max(0.0, s.end_s - max(s.start_s, start_s)) for s in inside)
    assert report.busy_s[0] * 3 == pytest.approx(busy_s)
    assert report.busy_fraction[0] == pytest.approx(busy_s / sum(report.iteration_s[1:]))


def test_a_resumed_run_reports_its_own_iterations():
    report, _ = _report(steps=4, first_step=2)
    assert len(report.iteration_s) == 2
    assert (report.first_step, report.steps, report.steady_steps) == (2, 4, (3,))


def test_a_report_survives_its_file_and_a_wrong_one_is_refused(tmp_path):
    report, _ = _report()
    save_report(report, tmp_path / "run.json")
    assert load_report(tmp_path / "run.json") == report
    with pytest.raises(UserError, match="cannot read the report"):
        load_report(tmp_path / "nothing.json")
    (tmp_path / "run.json").write_text('{"schema_version": 1}')
    with pytest.raises(UserError, match="policy"):
        load_report(tmp_path / "run.json")
