"""``plan diff``: what two plans decide differently."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from muxtune.api.difference_summary import difference_table
from muxtune.cli.options import JsonFlag, WideFlag
from muxtune.cli.output import emit
from muxtune.plan import load_plan
from muxtune.plan.difference import compare_plans


def diff(
    first: Annotated[Path, typer.Argument(metavar="A", help="A plan.json.", show_default=False)],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another one.", show_default=False)],
    wide: WideFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """What two plans decide differently, and what is predicted of each."""
    difference = compare_plans(load_plan(first), load_plan(second))
    emit(difference, difference_table(difference), wide=wide, as_json=as_json)
