"""``sweep``: many plans, one table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from muxtune.api.sweep_costs import FoundCosts, profile_digest
from muxtune.cli.options import JsonFlag, ProfilePath, WideFlag
from muxtune.cli.output import check_writable, emit
from muxtune.support.clean_stdout import stdout_kept_clean


def sweep(
    sweep: Annotated[Path, typer.Argument(metavar="SWEEP", help="A sweep file (YAML).", show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="Where the rows go (Parquet).", show_default=False)],
    profile: ProfilePath = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes; all cores by default.")] = None,
    backend: Annotated[
        Literal["loky", "ray"], typer.Option(help="This machine, or the Ray cluster of RAY_ADDRESS.")
    ] = "loky",
    resume: Annotated[bool, typer.Option("--resume", help="Keep the points that are finished.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the sweep that OUT has.")] = False,
    wide: WideFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Plan every point of a grid or list; one row of a Parquet file for each."""
    check_writable(out, "--out", inputs=[sweep, profile])
    from experiments.sweep import run_sweep, summary_text

    with stdout_kept_clean():
        summary = run_sweep(
            sweep,
            out,
            source=FoundCosts(profile),
            costs_digest=profile_digest(profile),
            jobs=jobs,
            backend=backend,
            resume=resume,
            force=force,
            progress=True,
        )
    emit(summary, summary_text(summary), wide=wide, as_json=as_json)
