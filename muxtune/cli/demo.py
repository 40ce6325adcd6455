"""``demo``: the whole loop."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from muxtune.cli.options import JsonFlag, WideFlag
from muxtune.cli.output import emit
from muxtune.support.clean_stdout import stdout_kept_clean


def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder; an earlier demo in it is replaced.")] = Path(
        "runs/demo"
    ),
    wide: WideFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """The whole loop on this machine, in minutes: profile, plan, simulate, run, validate, compare."""
    from experiments.demo import run_demo

    with stdout_kept_clean():
        report = run_demo(out)
    emit(report, report.to_markdown(), wide=wide, as_json=as_json)
