"""``run`` and ``validate``: real execution."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from muxtune.api.run_summary import run_table
from muxtune.api.validation_summary import validation_table
from muxtune.cli.options import GanttPath, JsonFlag, PlanPath, WideFlag
from muxtune.cli.output import check_writable, emit, written
from muxtune.plan import load_plan
from muxtune.support.clean_stdout import stdout_kept_clean
from muxtune.support.printable import one_line
from muxtune.support.processes import end_process, under_torchrun

SOME_FAILED_EXIT_CODE = 3
"""Exit code of a run that has finished, but for some tasks."""


def run(
    plan: PlanPath,
    out: Annotated[Path, typer.Option("--out", help="Folder of the run.")],
    steps: Annotated[
        int | None, typer.Option(min=1, help="Optimizer steps per task; all by default.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the folder's checkpoints.")] = False,
    peer_timeout_s: Annotated[
        float, typer.Option("--peer-timeout", help="Seconds after which a rank that does not answer hangs.")
    ] = 1800.0,
    strict: Annotated[
        bool, typer.Option("--strict", help="End the run if a task fails; else the others go on.")
    ] = False,
    json_lines: Annotated[
        Path | None,
        typer.Option("--json-lines", help="Add a JSON object a line on all tasks, every two seconds or so."),
    ] = None,
    device: Annotated[
        Literal["cpu", "cuda"] | None,
        typer.Option(help="Compute on these instead of what the plan is for; times are then not comparable."),
    ] = None,
    wide: WideFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Execute a plan with torch, on ranks that it starts itself or under torchrun."""
    check_writable(out, "--out", folder=True)
    check_writable(json_lines, "--json-lines", inputs=[plan])
    joins = under_torchrun()
    if not joins:
        costs = load_plan(plan).costs  # a bad plan is refused before torch is loaded
        if costs.mark is not None:
            typer.echo(f"muxtune: the times of this plan are {costs.mark}", err=True)
    from runtime import PEER_LOST_EXIT_CODE, PeerLostError, RunOptions, run_plan

    options = RunOptions(
        steps=steps,
        resume=resume,
        peer_timeout_s=peer_timeout_s,
        device=device,
        strict=strict,
        json_lines=json_lines,
        progress=True,
    )
    try:
        with stdout_kept_clean():
            report = run_plan(plan, out, options)
    except PeerLostError:  # only under torchrun, which says what this rank knows; another one has the cause
        end_process(PEER_LOST_EXIT_CODE)
    # Under torchrun every rank comes here, and one of them speaks.
    failed = [task for task in report.tasks if task.state == "failed"]
    speaks = not joins or os.environ["RANK"] == "0"
    if speaks:
        emit(report, run_table(report) + written(out), wide=wide, as_json=as_json)
        for task in failed:
            sys.stderr.write(f"muxtune: task failed: {one_line(str(task.reason))}\n")
    code = SOME_FAILED_EXIT_CODE if failed and speaks else 0
    if joins:
        end_process(code)
    sys.exit(code)


def validate(
    plan: PlanPath,
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Folder of a run.", show_default=False)],
    solo_steps: Annotated[
        int | None,
        typer.Option(min=0, help="Steps of each task's solo run to compare with; as many as ran by default."),
    ] = None,
    gantt: GanttPath = None,
    details: Annotated[
        bool, typer.Option("--details", help="Also a row per hTask, and one per iteration.")
    ] = False,
    wide: WideFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Compare a run with its prediction, say what explains the difference, and compare with solo runs."""
    check_writable(gantt, "--gantt", inputs=[plan])
    loaded = load_plan(plan)
    from runtime import validate_run

    with stdout_kept_clean():
        report = validate_run(loaded, run_dir, solo_steps=solo_steps)
    if gantt is not None:
        from experiments.gantt import draw_plan

        draw_plan(loaded, gantt, run_dir=run_dir)
    emit(report, validation_table(report, details=details) + written(gantt), wide=wide, as_json=as_json)
