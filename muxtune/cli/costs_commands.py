"""``costs``: what operators cost on a device, and how well that is known."""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from typing import Annotated, Literal

import typer
from pydantic import BaseModel

from muxtune.cli.options import JsonFlag, WideFlag
from muxtune.cli.output import check_writable, emit, written
from muxtune.support.errors import SpecError

_PIPE_COLUMNS = 140
"""Width of the tables, in characters, where the output is no terminal."""

costs_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


class GemmSummary(BaseModel):
    """What ``muxtune costs gemm --json`` prints."""

    rows: int
    device: str
    out: Path
    seconds: float
    """Seconds that reading, predicting and writing took."""
    model: Literal["analytic", "measured"]
    measurements: int
    """Products in ``--table``."""


@costs_app.command()
def gemm(
    device: Annotated[str, typer.Option("--device", help="a40, a100 or h100.")],
    shapes: Annotated[
        Path, typer.Option("--shapes", help="Table with columns m, n, k (.parquet or .csv); others are kept.")
    ],
    out: Annotated[Path, typer.Option("--out", help="The same with predicted_ms (.parquet or .csv).")],
    table: Annotated[
        Path | None,
        typer.Option(
            "--table",
            help="Measured products of this device (m, n, k, median_ms), which refine the prediction.",
            show_default=False,
        ),
    ] = None,
    wide: WideFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Predict the time of matrix products y[m, n] = x[m, k] W[k, n] in 16 bits."""
    start_s = time.perf_counter()
    check_writable(out, "--out")
    if not out.absolute().parent.is_dir():
        raise SpecError("--out", str(out), "a file in a folder that exists")
    from muxtune.costs.gemm_table import predict_gemm_table
    from muxtune.support.user_tables import check_suffix

    check_suffix(out, "--out")
    done = predict_gemm_table(shapes, out, device=device, table=table)
    summary = GemmSummary(
        rows=done.rows,
        device=device,
        out=out,
        seconds=time.perf_counter() - start_s,
        model=done.model,
        measurements=done.measurements,
    )
    how = f"from {done.measurements:,} measurements and the device model" if table else "by the device model"
    emit(
        summary,
        f"{out}: {done.rows:,} products on {device}, predicted {how} in {summary.seconds:.1f} s",
        wide=wide,
        as_json=as_json,
    )


@costs_app.command()
def report(
    table: Annotated[
        list[Path] | None,
        typer.Option(
            "--table",
            help="Measurements to compare with, as muxtune profile import writes them; repeatable.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder for the tables as CSV, and a picture.", show_default=False),
    ] = None,
    wide: WideFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Show where the shipped costs come from, how well they fit, and their errors on measurements."""
    check_writable(out, "--out", folder=True)
    from experiments.costs.report import report_costs
    from experiments.costs.tables import render_report

    found = report_costs(table or (), out)
    width = shutil.get_terminal_size((_PIPE_COLUMNS, 0)).columns
    text = "" if as_json else render_report(found, width=width, colour=sys.stdout.isatty())
    emit(found, text + written(out), wide=wide, as_json=as_json, styled=True)
