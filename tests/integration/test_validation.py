"""A real run on two ranks against its plan: what happened is in the tables, and the parts add up."""

from __future__ import annotations

import pytest

from experiments.gantt import draw_plan
from muxtune.api.validation_summary import validation_table
from muxtune.model import load_model_spec
from muxtune.schedule import iteration_ends_s, load_trace
from muxtune.tasks import Workload
from muxtune.validation import read_run
from muxtune.validation.replay import iteration_ends_s as replayed_ends_s
from muxtune.validation.replay import replay, stages_meet
from runtime import ValidationReport, load_report, run_plan, validate_run
from tests.helpers import make_plan, make_task, write_examples

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.usefixtures("quick_ranks")]


def test_a_real_run_is_explained_whole(tmp_path, hf_dirs):
    tasks = tuple(
        make_task(name, write_examples(tmp_path / f"{name}.jsonl", seed=seed), steps=8, max_grad_norm=norm)
        for seed, (name, norm) in enumerate({"a": 0.05, "b": None, "c": None}.items())
    )
    plan = make_plan(
        Workload(tasks=tasks), load_model_spec(str(hf_dirs["llama"])), partition=[["a", "b"], ["c"]]
    )
    run_dir = tmp_path / "run"
    run_plan(plan, run_dir)
    validation = validate_run(plan, run_dir, solo_steps=0)

    report = load_report(run_dir / "run.json")
    spans = load_trace(run_dir / "trace.json")
    run = read_run(plan, spans, report.steady_steps)
    played = replay(run.stages, lambda s, i: run.timings[s][i], lambda clock: stages_meet(plan, clock))
    # nanoseconds of the trace's file; the clocks of the ranks are one
    assert list(replayed_ends_s(run.stages, played).values()) == pytest.approx(
        iteration_ends_s(spans), abs=1e-7
    )

    parts = validation.explanation.parts
    difference_s = validation.measured_iteration_s - validation.predicted_iteration_s
    assert sum(part.seconds for part in parts) == pytest.approx(difference_s, abs=1e-9)
    assert validation.explanation.measured_s == report.median_iteration_s
    causes = {part.cause for part in parts}
    assert {"F", "B", "STEP", "messages", "exchange", "between", "variation", "rest"} <= causes

    assert [row.step for row in validation.iterations] == list(range(8))
    assert [row.seconds.measured for row in validation.iterations] == pytest.approx(
        report.iteration_s, abs=1e-7
    )
    for stage, row in enumerate(validation.stages):
        # what starts before its tensor is there, and calls in between, count here and not there
        busy_s = row.forward_s.measured + row.backward_s.measured + row.step_s.measured
        assert busy_s == pytest.approx(report.busy_s[stage], rel=0.25)
    for row in validation.classes:
        (htask,) = row.htasks
        measured = {"F": report.fwd_s, "B": report.bwd_s, "STEP": report.step_s}[row.kind]
        assert row.median_s == pytest.approx(measured[row.stage][htask], rel=0.1, abs=1e-4), row

    assert ValidationReport.model_validate_json(validation.model_dump_json()) == validation
    text = validation_table(validation, details=True)
    assert "F, stage 1, hTask 0" in text
    assert "iteration 7" in text
    assert "not explained" in text
    draw_plan(plan, tmp_path / "gantt.png", run_dir=run_dir)
    assert (tmp_path / "gantt.png").stat().st_size > 5_000


def test_in_float32_a_task_is_judged_by_how_far_peft_is_from_itself(tmp_path, hf_dirs):
    tasks = tuple(
        make_task(name, write_examples(tmp_path / f"{name}.jsonl", seed=seed), steps=5)
        for seed, name in enumerate("ab")
    )
    model = load_model_spec(str(hf_dirs["llama"]), "float32")
    plan = make_plan(Workload(tasks=tasks), model, partition=[["a", "b"]], pp=1)
    run_plan(plan, tmp_path / "run")
    for steps, whole in ((5, True), (2, False)):
        validation = validate_run(plan, tmp_path / "run", solo_steps=steps)
        for task in validation.tasks:
            assert 0 < task.loss_spread < 1e-5, "the second solo run sums in another order"
            assert task.loss_bound == max(1e-5, 2 * task.loss_spread)
            assert (task.adapter_spread is not None) == (task.adapter_bound is not None) == whole
            assert task.agreement == "within"
        assert " of 1.0e-05" in validation_table(validation, details=False)

    undecided = validation.tasks[0].model_copy(update={"agreement": "undecided", "loss_spread": float("nan")})
    table = validation_table(validation.model_copy(update={"tasks": (undecided,)}), details=False)
    assert "a: undecided, as peft alone differs from itself by nan (loss)" in table
