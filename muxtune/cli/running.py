"""``run`` and ``validate``: real execution."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from muxtune.cli.options import GanttPath, JsonFlag, PlanPath
from muxtune.cli.output import check_writable, emit, stdout_kept_clean
from muxtune.plan import load_plan
from muxtune.tables import format_table, show_bytes, show_difference, show_percent, show_rate, show_seconds

if TYPE_CHECKING:
    from runtime import RunReport, ValidationReport


def run(
    plan: PlanPath,
    out: Annotated[Path, typer.Option("--out", help="Folder of the run.")],
    steps: Annotated[
        int | None, typer.Option(min=1, help="Optimizer steps per task; all by default.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the folder's checkpoints.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Execute a plan with torch, on ranks that it starts itself or under torchrun."""
    check_writable(out, "--out", folder=True)
    load_plan(plan)  # a bad plan is refused before torch is loaded
    from runtime import run_plan

    with stdout_kept_clean():
        report = run_plan(plan, out, steps=steps, resume=resume, progress=True)
    # Under torchrun every rank comes here, and one of them speaks.
    if "WORLD_SIZE" not in os.environ or os.environ.get("RANK") == "0":
        emit(report, run_table(report), as_json=as_json)


def validate(
    plan: PlanPath,
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Folder of a run.", show_default=False)],
    solo_steps: Annotated[
        int | None,
        typer.Option(min=0, help="Steps of each task's solo run to compare with; as many as ran by default."),
    ] = None,
    gantt: GanttPath = None,
    as_json: JsonFlag = False,
) -> None:
    """Compare a run with its prediction, and its losses with solo Hugging Face peft runs."""
    check_writable(gantt, "--gantt")
    loaded = load_plan(plan)
    from runtime import validate_run

    with stdout_kept_clean():
        report = validate_run(loaded, run_dir, solo_steps=solo_steps)
    if gantt is not None:
        from experiments.gantt import draw_plan

        draw_plan(loaded, gantt, run_dir=run_dir)
    emit(report, validation_table(report), as_json=as_json)


def run_table(report: RunReport) -> str:
    """What a run took."""
    rows = [
        ["iterations", f"{report.steps}"],
        ["iteration", show_seconds(report.median_iteration_s)],
        ["tokens/s", show_rate(report.tokens_per_s)],
        ["billed tokens/s", show_rate(report.billed_tokens_per_s)],
        ["effective tokens/s", show_rate(report.effective_tokens_per_s)],
        ["busy per stage", ", ".join(map(show_percent, report.busy_fraction))],
        ["peak memory per stage", ", ".join(show_bytes(stage.peak_bytes) for stage in report.memory)],
    ]
    return format_table(["measured", ""], rows)


def validation_table(report: ValidationReport) -> str:
    """Predictions beside measurements, then every task beside its solo run."""
    rows = [
        _compared("iteration", report.predicted_iteration_s, report.measured_iteration_s, show_seconds),
        _compared(
            "effective tokens/s",
            report.predicted_effective_tokens_per_s,
            report.measured_effective_tokens_per_s,
            show_rate,
        ),
    ]
    for stage, busy in enumerate(report.busy_s):
        rows.append(_compared(f"busy, stage {stage}", busy.predicted, busy.measured, show_seconds))
    for stage, peak in enumerate(report.peak_memory_bytes):
        rows.append(_compared(f"peak memory, stage {stage}", peak.predicted, peak.measured, show_bytes))
    tasks = [
        [
            task.task_id,
            str(task.steps),
            f"{task.first_loss:.4f}",
            f"{task.last_loss:.4f}",
            str(task.solo_steps),
            _show_error(task.loss_difference),
            _show_error(task.adapter_error),
        ]
        for task in report.tasks
    ]
    header = ["task", "steps", "first loss", "last loss", "solo steps", "loss difference", "adapter error"]
    numbers = format_table(["", "predicted", "measured", "difference"], rows)
    return f"{numbers}\n\n{format_table(header, tasks)}"


def _compared(name: str, predicted: float, measured: float, show: Callable[[float], str]) -> list[str]:
    difference = show_difference(predicted, measured) if measured else "-"
    return [name, show(predicted), show(measured), difference]


def _show_error(error: float | None) -> str:
    return "-" if error is None else f"{error:.1e}"
