"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

WorkloadPath = Annotated[Path, typer.Option("--workload", help="Workload file (YAML).")]
ModelName = Annotated[
    str | None,
    typer.Option("--model", help="Preset or Hugging Face directory; the workload's backbone by default."),
]
ClusterName = Annotated[
    str, typer.Option("--cluster", help="cpu-N, testbed-a, -b or -c, a100-N, or a YAML file.")
]
ProfilePath = Annotated[
    Path | None,
    typer.Option(
        "--profile",
        help="Operator costs; by default a GPU's that ship, or this machine's: as `muxtune profile` measured "
        "and kept them, or estimated.",
    ),
]
PlanPath = Annotated[Path, typer.Argument(metavar="PLAN", help="A plan.json.", show_default=False)]
GanttPath = Annotated[
    Path | None, typer.Option("--gantt", help="Draw the timeline (.png, .svg or .pdf).", show_default=False)
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, nothing else.")]
WideFlag = Annotated[
    bool, typer.Option("--wide", help="All columns and whole texts of tables, however narrow the terminal.")
]

DEFAULT_CLUSTER = "cpu-2"


def was_given(context: typer.Context, name: str) -> bool:
    """Whether a parameter of the command stands on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
